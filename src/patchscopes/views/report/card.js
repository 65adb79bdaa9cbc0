// The card of a cell: what is said there, its evidence, and what the same scope says without this state.

const KINDS = {
  nothing: "nothing patched in",
  zero: "a vector of zeros",
  map_of_zero: "what the map makes of zero",
  random: "a random vector",
  random_covariance: "a random vector that lies as states do",
  other: "another source's state",
  mean: "the mean of other sources",
  context: "the same words in another context",
  text: "the words alone, nothing patched",
  text_at_position: "the words read alone, nothing patched",
};
const EVIDENCE = [
  ["bits_over_nothing", "over nothing"],
  ["bits_over_random", "over random vectors"],
  ["bits_over_others", "over other sources"],
  ["bits_over_text", "over the words alone"],
];

/** The card of reading `i`, as the children of an element. */
function cardOf(data, look, i) {
  if (i < 0) return [make("p", { class: "hint" }, "Point at a cell, or walk with the arrow keys: its reading, its evidence and its controls are shown here.")];
  const { columns } = look;
  const of = (name) => columns[name][i];
  const token = visible(text(data, look, "token", i) ?? "");
  const [from, to] = [of("source_layer"), of("target_layer")];
  const place = [make("span", {}, `layer ${from}${from === to ? "" : ` → ${to}`} · position ${of("position")} `), said(token.trim() || "␣", { class: "token" })];
  const head = make("p", { class: "place" }, ...place);
  const what = status(data, look, i);
  if (what !== "ok") return [head, make("p", { class: `status ${what}` }, STATES[what]), failure(data, look, i), ...promptOf(data, look, i)];
  const kind = verdict(data, look, i);
  const words = shown(data, look, "text", i);
  return [
    head,
    make("p", { class: "says" }, words ? said(words) : make("i", {}, "says nothing")),
    make("p", { class: `verdict ${kind.replace(" ", "-")}` }, make("span", { "aria-hidden": "true" }, VERDICTS[kind].mark), ` ${VERDICTS[kind].words}`, of("p_value") === null ? "" : `, p = ${number(of("p_value"), { units: "probability" })}`),
    kind === "not run" ? make("p", { class: "hint" }, "Nothing can be told from this reading: its controls were not run.") : evidence(look, i),
    facts(data, look, i),
    controlsOf(data, look, i),
    ...promptOf(data, look, i),
  ];
}

function failure(data, look, i) {
  const why = text(data, look, "error", i);
  return why ? make("p", {}, said(visible(why))) : null;
}

function evidence(look, i) {
  const values = EVIDENCE.map(([name]) => look.columns[name][i]);
  const most = Math.max(1, ...values.filter((v) => v !== null && Number.isFinite(v)).map(Math.abs));
  const rows = EVIDENCE.map(([, words], k) =>
    make("tr", {}, make("th", { scope: "row" }, words), make("td", { class: "n" }, values[k] === null ? "not run" : number(values[k], { units: "bits", signed: true })), make("td", {}, bar(values[k], most))),
  );
  return make("table", { class: "small" }, make("caption", {}, "Evidence, bits"), make("tbody", {}, ...rows));
}

/** A bar to the left or to the right of zero. */
function bar(value, most) {
  const svg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, v] of Object.entries(attributes)) element.setAttribute(name, v);
    return element;
  };
  const whole = svg("svg", { class: "bar", viewBox: "-50 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
  const length = value !== null && Number.isFinite(value) ? (50 * Math.abs(value)) / most : 0;
  whole.append(svg("rect", { class: "track", x: -50, width: 100, height: 8 }));
  whole.append(svg("rect", { class: value < 0 ? "value minus" : "value", x: value < 0 ? -length : 0, width: length, height: 8 }));
  whole.append(svg("rect", { class: "zero", x: -0.6, width: 1.2, height: 8 }));
  return whole;
}

function facts(data, look, i) {
  const rows = data.metrics
    .filter(({ name }) => ["surprisal", "logprob", "norm_ratio"].includes(name) && look.columns[name][i] !== null)
    .map((metric) => [metric.label, `${number(look.columns[metric.name][i], metric)} ${UNITS[metric.units]}`]);
  const next = text(data, look, "next_token", i);
  const all = [["next token", next === null ? "" : said(visible(next).replaceAll(" ", "␣"))], ...rows];
  return make("dl", { class: "facts small" }, ...all.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function controlsOf(data, look, i) {
  const kinds = Object.entries(look.controls).filter(([, control]) => control.status[i] !== null);
  if (!kinds.length) return null;
  const rows = kinds.map(([kind, control]) => {
    const what = data.status[control.status[i]];
    const words = control.text[i] === null ? "" : visible(data.strings[control.text[i]]).trim();
    const cell = what === "ok" ? (words ? said(words) : make("i", {}, "nothing")) : make("i", {}, STATES[what]);
    return make("tr", {}, make("th", { scope: "row" }, KINDS[kind]), make("td", {}, cell));
  });
  return make("table", { class: "small fixed" }, make("caption", {}, "The same scope without this state"), make("tbody", {}, ...rows));
}

function promptOf(data, look, i) {
  const k = look.prompts.number.indexOf(look.columns.prompt[i]);
  if (k < 0) return [];
  const labels = Object.entries(look.prompts.labels?.[k] ?? {});
  const words = labels.map(([name, value]) => `${name}: ${visible(value)}`).join(", ");
  return [make("p", { class: "hint" }, "in ", said(`“${visible(data.strings[look.prompts.text[k]])}”`), words ? make("span", {}, ` · ${words}`) : null)];
}
