// The last minutes of the server, drawn from /metrics, which is read every two seconds.

import { metrics } from "./api.js";

const at = (id) => document.getElementById(id);
const EVERY = 2; // seconds
const KEPT = 300; // seconds

// The mean of a histogram's observations between two readings; null if there were none.
function mean(now, before, name) {
  const count = now[`${name}_count`] - before[`${name}_count`];
  return count > 0 ? (now[`${name}_sum`] - before[`${name}_sum`]) / count : null;
}

const time = (seconds) => new Date(1000 * seconds).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
const number = (digits, unit) => (value) => (value == null ? "–" : `${value.toFixed(digits)}${unit}`);

// Each plot: its lines have a name, a colour, and a function of two readings and the seconds between them. The
// axis reaches to `most`, or to the highest value, at least to `least`.
const PLOTS = [
  {
    title: "Tokens per second",
    format: number(0, ""),
    least: 10,
    lines: [["written", "#3b82f6", (now, before, seconds) => (now.generated_tokens_total - before.generated_tokens_total) / seconds]],
  },
  {
    title: "Latency",
    format: (value) => (value == null ? "–" : value < 1 ? `${(1000 * value).toFixed(0)} ms` : `${value.toFixed(1)} s`),
    least: 0.02,
    lines: [
      ["first token", "#f59e0b", (now, before) => mean(now, before, "time_to_first_token_seconds")],
      ["later tokens", "#10b981", (now, before) => mean(now, before, "time_per_output_token_seconds")],
    ],
  },
  {
    title: "Requests",
    format: number(0, ""),
    least: 4,
    lines: [
      ["running", "#3b82f6", (now) => now.requests_running],
      ["waiting", "#ef4444", (now) => now.requests_waiting],
    ],
  },
  {
    title: "Cache in use",
    format: number(0, "%"),
    lines: [["pages", "#8b5cf6", (now) => (100 * (now.pages - now.free_pages)) / now.pages]],
    most: 100,
  },
];
const TOTALS = {
  "Tokens written": (now) => now.generated_tokens_total.toLocaleString(),
  "Prompt tokens": (now) => now.prompt_tokens_total.toLocaleString(),
  "spared by the prefix cache": (now) => `${(100 * now.prefix_cache_hit_ratio).toFixed(0)}%`,
  "Preemptions": (now) => now.preemptions_total.toLocaleString(),
};

const times = [];
const drawn = PLOTS.map((plot) => ({ ...plot, values: plot.lines.map(() => []), chart: null }));

function make(plot) {
  const heading = document.createElement("h2");
  const latest = document.createElement("output");
  const box = document.createElement("div");
  heading.append(plot.title, ...(plot.lines.length > 1 ? plot.lines.map(legend) : []), latest);
  at("totals").before(heading, box);
  const axis = {
    stroke: () => getComputedStyle(heading).color,
    grid: { stroke: () => getComputedStyle(at("plots")).borderLeftColor, width: 1 },
    ticks: { show: false },
    font: "11px system-ui",
  };
  const size = () => ({ width: Math.max(box.clientWidth, 200), height: 110 });
  const chart = new uPlot(
    {
      ...size(),
      legend: { show: false },
      cursor: { y: false, points: { size: 6 } },
      scales: { y: { range: (_, low, high) => [0, plot.most ?? Math.max(1.1 * (high ?? 0), plot.least)] } },
      series: [{}, ...plot.lines.map(([label, stroke]) => (
        { label, stroke, width: 2, fill: `${stroke}22`, spanGaps: true, points: { show: false } }
      ))],
      axes: [
        { ...axis, size: 22, space: 80, values: (_, marks) => marks.map(time) },
        { ...axis, size: 52, space: 28, values: (_, marks) => marks.map(plot.format) },
      ],
    },
    [times, ...plot.values],
    box,
  );
  new ResizeObserver(() => chart.setSize(size())).observe(box);
  Object.assign(plot, { chart, latest });
}

function legend([name, color]) {
  const text = document.createElement("span");
  text.className = "legend";
  text.style.color = color;
  text.textContent = name;
  return text;
}

let before = null;

async function read() {
  const now = { ...(await metrics()), time: Date.now() / 1000 };
  const old = before;
  before = now;
  at("totals").replaceChildren(...Object.entries(TOTALS).flatMap(([name, value]) => {
    const [label, number] = [document.createElement("dt"), document.createElement("dd")];
    [label.textContent, number.textContent] = [name, value(now)];
    return [label, number];
  }));
  if (!old) return;
  const drop = times.findIndex((time) => time > now.time - KEPT);
  times.push(now.time);
  times.splice(0, Math.max(drop, 0));
  for (const plot of drawn) {
    plot.lines.forEach(([, , value], line) => {
      plot.values[line].push(value(now, old, now.time - old.time));
      plot.values[line].splice(0, Math.max(drop, 0));
    });
    plot.latest.textContent = plot.values.map((values) => plot.format(values.findLast((value) => value != null))).join(" / ");
    plot.chart.setData([times, ...plot.values]);
    plot.chart.setScale("x", { min: now.time - KEPT, max: now.time });
  }
}

async function health() {
  const response = await fetch("health");
  const { status } = await response.json();
  return status;
}

async function watch() {
  let state = "out of reach";
  try {
    state = await health();
    await read();
  } catch {
    // Shown by the state; the next reading may succeed.
  }
  at("state").textContent = state;
  at("state").className = state;
  setTimeout(watch, 1000 * EVERY);
}

drawn.forEach(make);
document.addEventListener("theme", () => drawn.forEach(({ chart }) => chart.redraw()));
watch();
