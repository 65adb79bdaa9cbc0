// The readings of this page: decoded once, then asked for by their number.

const $ = (id) => document.getElementById(id);

/** An element. Texts are only ever put in as text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** What a model or a prompt said, in an element of its own direction. */
const said = (text, attributes = {}) => make("bdi", attributes, text);

async function decode() {
  const packed = atob($("data").textContent.trim());
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = JSON.parse(await new Response(stream).text());
  for (const look of data.looks) {
    for (const { name } of data.metrics) {
      look.columns[name] = look.columns[name].map((v) => (typeof v === "string" ? Number(v) : v)); // "NaN", "Infinity"
    }
    look.size = look.columns.status.length;
    look.first = new Map(); // where the readings of a prompt begin
    look.columns.prompt.forEach((prompt, i) => look.first.has(prompt) || look.first.set(prompt, i));
    look.metrics = data.metrics.filter(({ name }) => look.columns[name].some((v) => v !== null));
    if (!look.metrics.length) look.metrics = data.metrics.filter(({ name }) => name === "surprisal");
  }
  return data;
}

const LETTERS = { "\n": "↵", "\t": "⇥", "\r": "␍" };
/** Text with its control characters made visible. */
const visible = (text) =>
  text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) =>
    c === "\u200d" ? c : (LETTERS[c] ?? `\\x${c.codePointAt(0).toString(16).padStart(2, "0")}`),
  );

/** The text of a column of texts; null if there is none. */
const text = (data, look, column, i) => {
  const number = look.columns[column][i];
  return number === null ? null : data.strings[number];
};
const shown = (data, look, column, i) => visible(text(data, look, column, i) ?? "").trim();

/** "ok", "failed", "skipped" or "waiting". */
const status = (data, look, i) => data.status[look.columns.status[i]];

/** What can be shown of a metric of a reading: "value", "nan", "none" (not measured), or the status if it is not ok. */
function state(data, look, metric, i) {
  if (i < 0) return "empty";
  const what = status(data, look, i);
  if (what !== "ok") return what;
  const value = look.columns[metric][i];
  return value === null ? "none" : Number.isNaN(value) ? "nan" : "value";
}

const DIGITS = { bits: 1, nats: 2, ratio: 2, probability: 2 };
/** A number as people read it. */
function number(value, metric) {
  if (value === null) return "";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const digits = DIGITS[metric.units] ?? 2;
  if (metric.units === "probability" && value > 0 && value < 0.01) return value.toPrecision(2);
  const fixed = (Math.abs(value) < 0.5 * 10 ** -digits ? 0 : value).toFixed(digits).replace("-", "−");
  return metric.signed && value > 0 && !/^0\.?0*$/.test(fixed) ? `+${fixed}` : fixed;
}

const VERDICTS = {
  above: { mark: "▲", words: "above its controls" },
  same: { mark: "○", words: "same as its controls" },
  "not run": { mark: "×", words: "controls not run" },
};
const verdict = (data, look, i) =>
  status(data, look, i) === "ok" ? (VERDICTS[text(data, look, "verdict", i)] ? text(data, look, "verdict", i) : "not run") : null;

const STATES = {
  nan: "NaN: not a number",
  none: "not measured",
  failed: "failed",
  skipped: "skipped",
  waiting: "waiting: not run yet",
  empty: "no such cell",
};
