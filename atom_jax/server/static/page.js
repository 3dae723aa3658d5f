// What is around chat and plots: colours, and the two panels that a narrow window hides.

import "./chat.js";
import "./plots.js";

const at = (id) => document.getElementById(id);

const THEMES = { auto: "◐", light: "☀", dark: "☾" };

function setTheme(name) {
  const root = document.documentElement;
  if (name === "auto") delete root.dataset.theme;
  else root.dataset.theme = name;
  at("theme").textContent = THEMES[name];
  at("theme").title = `Colours: ${name}`;
  localStorage.setItem("theme", name);
  document.dispatchEvent(new Event("theme"));
}

at("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(localStorage.getItem("theme")) + 1) % names.length]);
});
setTheme(localStorage.getItem("theme") in THEMES ? localStorage.getItem("theme") : "auto");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  document.dispatchEvent(new Event("theme")));

const PANELS = { "show-chats": "chats", "show-plots": "plots" };
for (const [button, panel] of Object.entries(PANELS)) {
  at(button).addEventListener("click", () => {
    for (const other of Object.values(PANELS)) at(other).classList.toggle("shown", other === panel && !at(panel).classList.contains("shown"));
  });
}
const hidePanels = () => Object.values(PANELS).forEach((panel) => at(panel).classList.remove("shown"));
document.querySelector("main").addEventListener("click", hidePanels);
at("list").addEventListener("click", hidePanels);
at("new").addEventListener("click", hidePanels);
document.addEventListener("keydown", (event) => event.key === "Escape" && hidePanels());
