// Real tables: of the map that is seen, and of all readings; both can be copied as tab-separated values.

const MOST_COLUMNS = 60; // of the map as a table
const PAGE = 50;

/** The map that is seen, as a table with headings. */
function gridTable(data, view) {
  const { grid, look, metric } = view;
  const range = seen(view);
  const [from, to] = [range.columns[0], Math.min(range.columns[1], range.columns[0] + MOST_COLUMNS)];
  const heading = (name) => (typeof name === "string" ? `ℓ* ${name}` : said(`${name.place}: ${name.token}`));
  const head = make("tr", {}, make("th", { scope: "col" }, grid.rowName), ...grid.labels.slice(from, to).map((name) => make("th", { scope: "col" }, heading(name))));
  const body = [];
  for (let r = range.rows[1] - 1; r >= range.rows[0]; r--) {
    const cells = [];
    for (let c = from; c < to; c++) cells.push(tableCell(data, look, metric, cellAt(grid, r, c)));
    body.push(make("tr", {}, make("th", { scope: "row" }, String(grid.rows[r])), ...cells));
  }
  const caption = `${metric.label}${metric.units ? ` (${metric.units})` : ""}: ${grid.rowName} by ${grid.columnName}`;
  return make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
}

function tableCell(data, look, metric, i) {
  const what = state(data, look, metric.name, i);
  if (!["value", "nan", "none"].includes(what)) return make("td", { class: "quiet", "data-reading": i }, STATES[what]);
  const kind = verdict(data, look, i);
  const value = what === "none" ? "not measured" : number(look.columns[metric.name][i], metric);
  const mark = make("span", { title: VERDICTS[kind].words }, make("span", { "aria-hidden": "true" }, VERDICTS[kind].mark), make("span", { class: "sr" }, VERDICTS[kind].words));
  return make("td", { "data-reading": i, "data-value": look.columns[metric.name][i] }, said(shown(data, look, "text", i) || "(nothing)"), make("br"), make("span", { class: "quiet" }, `${value} `, mark));
}

/** The whole map, not only what is seen. */
function gridTsv(data, view) {
  const { grid, look, metric } = view;
  const name = (one) => (typeof one === "string" ? one : `${one.place}: ${one.token}`);
  const lines = [[`${grid.rowName} \\ ${grid.columnName} [${metric.label}, ${metric.units}]`, ...grid.labels.map(name)]];
  for (let r = grid.rows.length - 1; r >= 0; r--) {
    lines.push([grid.rows[r], ...grid.places.map((_, c) => {
      const i = cellAt(grid, r, c);
      const what = state(data, look, metric.name, i);
      return what === "value" || what === "nan" ? look.columns[metric.name][i] : what;
    })]);
  }
  return tsv(lines);
}

/** Tab-separated; a text that a spreadsheet would take for a formula begins with an apostrophe. */
const tsv = (lines) =>
  lines.map((line) => line.map((v) => (typeof v === "string" ? visible(v).replace(/^([=+@-])/, "'$1") : (v ?? ""))).join("\t")).join("\n");

async function copy(words, told) {
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    const area = make("textarea", { class: "sr", "aria-hidden": "true" });
    area.value = words;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  told.textContent = "copied";
  setTimeout(() => (told.textContent = ""), 2000);
}

// ---------------------------------------------------------------------------------------------------- all readings

const all = { sort: null, down: false, page: 0, words: "", kind: "", everywhere: false, rows: [] };

/** The columns of the table of readings: name, how it is shown, how it is sorted. */
function columnsOf(data, looks) {
  const varies = (name) => looks.some((look) => new Set(look.columns[name]).size > 1);
  const plain = (name, head) => ({ head, numeric: true, value: (look, i) => look.columns[name][i] });
  const words = (name, head) => ({ head, value: (look, i) => shown(data, look, name, i), said: true });
  const measure = (metric, head) => ({ head: head ?? metric.label, numeric: true, value: (look, i) => look.columns[metric.name][i], show: (v) => (v === null ? "" : number(v, metric)) });
  const metrics = Object.fromEntries(data.metrics.map((metric) => [metric.name, metric]));
  const heading = (name, head) => ({ head, value: (look) => look[name] });
  return [
    ...["part", "model", "scope"].filter((name) => new Set(looks.map((look) => look[name])).size > 1).map((name) => heading(name, name)),
    { head: "prompt", said: true, clip: true, value: (look, i) => promptName(data, look, look.columns.prompt[i]) },
    plain("position", "i"),
    words("token", "token"),
    plain("source_layer", "ℓ"),
    ...(looks.some((look) => look.columns.target_layer.some((v, i) => v !== look.columns.source_layer[i])) ? [plain("target_layer", "ℓ*")] : []),
    ...(varies("target") ? [plain("target", "T")] : []),
    ...(varies("map") ? [words("map", "map")] : []),
    ...(varies("draw") ? [plain("draw", "draw")] : []),
    { ...words("text", "says"), wide: true },
    words("next_token", "next token"),
    measure(metrics.surprisal),
    measure(metrics.bits_over_nothing, "over nothing"),
    measure(metrics.bits_over_random, "over random"),
    measure(metrics.bits_over_others, "over others"),
    measure(metrics.bits_over_text, "over text"),
    measure(metrics.p_value, "p"),
    { head: "verdict", kind: "verdict", value: (look, i) => verdict(data, look, i) ?? status(data, look, i), show: (v) => `${VERDICTS[v]?.mark ?? "!"} ${v}` },
  ];
}

const promptName = (data, look, prompt) => visible(data.strings[look.prompts.text[look.prompts.number.indexOf(prompt)]] ?? "");

/** Choose, order and show readings. `go(look, i)` shows one in the map. */
function fillTable(data, current, go) {
  const looks = all.everywhere ? data.looks : [current];
  const columns = columnsOf(data, looks);
  const needle = all.words.toLowerCase();
  const found = [];
  for (const look of looks) {
    const names = new Map(look.prompts.number.map((prompt) => [prompt, promptName(data, look, prompt).toLowerCase()]));
    for (let i = 0; i < look.size; i++) {
      if (all.kind && (verdict(data, look, i) ?? status(data, look, i)) !== all.kind) continue;
      if (needle && !names.get(look.columns.prompt[i]).includes(needle) && !["text", "token", "next_token"].some((name) => (text(data, look, name, i) ?? "").toLowerCase().includes(needle))) continue;
      found.push([look, i]);
    }
  }
  const by = columns.find(({ head }) => head === all.sort);
  if (by) {
    const keys = new Map(found.map((row) => [row, by.value(...row)]));
    const missing = (v) => v === null || Number.isNaN(v);
    const compare = (a, b) => (missing(a) || missing(b) ? missing(a) - missing(b) : (by.numeric ? a - b : a < b ? -1 : a > b ? 1 : 0) * (all.down ? -1 : 1));
    found.sort((a, b) => compare(keys.get(a), keys.get(b)));
  }
  all.rows = found;
  all.page = Math.max(0, Math.min(all.page, Math.ceil(found.length / PAGE) - 1));
  const again = () => fillTable(data, current, go);
  const order = (head) => () => ((all.down = all.sort === head ? !all.down : false), (all.sort = head), (all.page = 0), again(), $("table").querySelector("th[aria-sort] button")?.focus());
  const heads = columns.map(({ head, numeric }) => {
    const here = all.sort === head;
    const button = make("button", { type: "button", onclick: order(head) }, head, make("span", { "aria-hidden": "true" }, here ? (all.down ? " ▼" : " ▲") : ""));
    return make("th", { scope: "col", class: numeric && "n", "aria-sort": here ? (all.down ? "descending" : "ascending") : null }, button);
  });
  const rows = found.slice(all.page * PAGE, (all.page + 1) * PAGE).map(([look, i]) => {
    const cells = columns.map(({ value, show, numeric, said: spoke, wide, clip, kind: own }, k) => {
      const v = value(look, i);
      const words = show ? show(v) : String(v ?? "");
      const inner = spoke ? said(words || (wide && status(data, look, i) === "ok" ? "(nothing)" : "")) : words;
      const kind = [numeric && "n", wide && "words", clip && "clip", spoke && "said", own].filter(Boolean).join(" ");
      return make("td", { class: kind || null }, k === 0 ? make("button", { type: "button", class: "link", title: `${words}: show in the map`, onclick: () => go(look, i) }, inner) : inner);
    });
    return make("tr", {}, ...cells);
  });
  const caption = make("caption", { class: "sr" }, "All readings");
  $("table").replaceChildren(make("table", {}, caption, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)));
  const turn = (step, words) => make("button", { type: "button", disabled: all.page + step < 0 || (all.page + step) * PAGE >= found.length, onclick: () => ((all.page += step), again()) }, words);
  const first = found.length ? all.page * PAGE + 1 : 0;
  const told = make("span", { role: "status" });
  const lines = () => [columns.map(({ head }) => head), ...found.map(([look, i]) => columns.map(({ value }) => value(look, i)))];
  $("pager").replaceChildren(
    turn(-1, "‹ before"),
    make("span", { role: "status", id: "pager-where" }, `${first.toLocaleString("en")}–${Math.min(found.length, (all.page + 1) * PAGE).toLocaleString("en")} of ${found.length.toLocaleString("en")} readings`),
    turn(1, "next ›"),
    make("button", { type: "button", onclick: () => copy(tsv(lines()), told) }, "Copy as TSV"),
    told,
  );
}
