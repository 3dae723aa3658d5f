// Chats with the model. They are kept in the browser (localStorage), and nowhere else.

import { chat, model } from "./api.js";

const at = (id) => document.getElementById(id);
const KEPT = 50; // chats; older ones are forgotten
const SETTINGS = ["system", "temperature", "tokens"];

let chats = load(); // the latest first: {title, messages: [{role, content, speed}]}
let current = null; // null before the first message of a new chat
let running = null; // the AbortController of the answer that is being written

function load() {
  try {
    const chats = JSON.parse(localStorage.getItem("chats") ?? "[]");
    return chats.filter((chat) => typeof chat.title === "string" && Array.isArray(chat.messages));
  } catch {
    return []; // not written by this page
  }
}

function save() {
  chats = chats.slice(0, KEPT);
  while (chats.length) {
    try {
      localStorage.setItem("chats", JSON.stringify(chats));
      return;
    } catch {
      chats.pop(); // no room for all of them
    }
  }
  localStorage.removeItem("chats");
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** Shows text in an element; what stands between lines of ``` becomes a block of code. */
function show(box, text) {
  const parts = text.split(/^ *```.*\n?/m);
  const shown = parts.map((part, index) => (index % 2 ? element("pre", "", part) : part.trim()));
  box.replaceChildren(...shown.filter(Boolean));
}

function addMessage({ role, content, speed }) {
  const box = element("article", `message ${role}`);
  const text = element("div", "text");
  show(text, content);
  box.append(text);
  if (role === "assistant") box.append(element("div", "speed", speed ?? ""));
  at("log").append(box);
  at("log").scrollTop = at("log").scrollHeight;
  return box;
}

function open(chat) {
  running?.abort();
  current = chat;
  at("log").replaceChildren();
  chat?.messages.forEach(addMessage);
  showList();
  at("prompt").focus();
}

function showList() {
  at("list").replaceChildren(...chats.map((chat) => {
    const item = element("li", chat === current ? "current" : "");
    const title = element("button", "open", chat.title);
    title.addEventListener("click", () => open(chat));
    const remove = element("button", "remove", "✕");
    remove.setAttribute("aria-label", `Delete ${chat.title}`);
    remove.addEventListener("click", () => {
      chats = chats.filter((other) => other !== chat);
      save();
      if (chat === current) open(null);
      else showList();
    });
    item.append(title, remove);
    return item;
  }));
}

async function showModel() {
  const { id, max_model_len: length } = await model(at("key").value);
  at("model").textContent = id;
  at("model").title = `${id}: at most ${length.toLocaleString()} tokens of question and answer`;
  return id;
}

function request(name, messages) {
  const [system, temperature, tokens] = SETTINGS.map((id) => at(id).value.trim());
  const sent = messages.map(({ role, content }) => ({ role, content }));
  return {
    model: name,
    messages: system ? [{ role: "system", content: system }, ...sent] : sent,
    ...(temperature && { temperature: Number(temperature) }),
    ...(tokens && { max_tokens: Number(tokens) }),
  };
}

/** Lets the model answer, into ``box``; returns what it has said, whether or not it came to an end. */
async function answer(messages, box, signal) {
  const began = performance.now();
  const said = { role: "assistant", content: "", speed: "" };
  const log = at("log");
  let first = null;
  try {
    const body = request(await showModel(), messages);
    for await (const event of chat(body, at("key").value, signal)) {
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      const text = event.choices[0]?.delta.content ?? "";
      if (text) {
        first ??= performance.now();
        said.content += text;
        show(box.querySelector(".text"), said.content);
      }
      if (event.usage) said.speed = speed(event.usage.completion_tokens, first - began, performance.now() - first);
      box.querySelector(".speed").textContent = said.speed;
      if (follows) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") addMessage({ role: "error", content: error.message });
  }
  return said;
}

function speed(tokens, waited, wrote) {
  const rate = tokens > 1 && wrote > 0 ? ` · ${((1000 * (tokens - 1)) / wrote).toFixed(1)} tokens/s` : "";
  return `${tokens} tokens${rate} · first after ${(waited / 1000).toFixed(2)} s`;
}

async function send(text) {
  if (!current) {
    current = { title: text.slice(0, 60), messages: [] };
    chats.unshift(current);
  }
  const own = current; // another chat may be opened meanwhile
  own.messages.push({ role: "user", content: text });
  at("log").querySelectorAll(".error").forEach((error) => error.remove());
  const question = addMessage(own.messages.at(-1));
  showList();
  const box = addMessage({ role: "assistant", content: "" });
  box.classList.add("waiting");
  const controller = (running = new AbortController());
  setRunning(true);
  const said = await answer(own.messages, box, controller.signal);
  box.classList.remove("waiting");
  if (said.content) own.messages.push(said);
  else {
    // Nothing was said: the question goes back to where it was written.
    own.messages.pop();
    question.remove();
    box.remove();
    at("prompt").value ||= text;
    if (!own.messages.length) {
      chats = chats.filter((chat) => chat !== own);
      if (current === own) current = null;
    }
  }
  if (running === controller) {
    running = null;
    setRunning(false);
  }
  save();
  showList();
}

function setRunning(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("prompt").value.trim();
  if (running || !text) return;
  at("prompt").value = "";
  send(text);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => open(null));
for (const id of SETTINGS) {
  at(id).value = localStorage.getItem(id) ?? "";
  at(id).addEventListener("change", () => localStorage.setItem(id, at(id).value));
}
at("key").addEventListener("change", () => showModel().catch(() => {}));

showList();
showModel().catch((error) => addMessage({ role: "error", content: error.message }));
