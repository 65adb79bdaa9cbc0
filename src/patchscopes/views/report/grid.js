// Which reading stands where: source layers upwards, positions or target layers to the right, as `Readings.grid` has it.

const sorted = (values) => [...new Set(values)].sort((a, b) => a - b);

const EVERY = -1; // instead of a prompt: all of them, a column each

/** Whether every prompt is read at one position only, and written at one layer for each layer read: then prompts can be columns. */
function isFlat(look) {
  if (look.flat === undefined) {
    const { prompt, position } = look.columns;
    const places = new Map();
    look.flat = look.prompts.number.length > 1 && prompt.every((p, i) => places.set(p, places.get(p) ?? position[i]).get(p) === position[i]);
    if (look.flat) look.flat = look.prompts.number.every((p) => targetsPerPlace(look, ofPrompt(look, p)) === 1);
  }
  return look.flat;
}

/** The readings of a prompt in a view, by their numbers. */
function ofPrompt(look, prompt) {
  if (prompt === EVERY) return look.columns.prompt.map((_, i) => i);
  const found = [];
  for (let i = look.first.get(prompt) ?? look.size; i < look.size && look.columns.prompt[i] === prompt; i++) found.push(i);
  return found;
}

/** What there is to choose from beside the prompt: each only where there is more than one. */
function choices(look, prompt) {
  const some = ofPrompt(look, prompt);
  const of = (name) => sorted(some.map((i) => look.columns[name][i]));
  const targets = prompt !== EVERY && targetsPerPlace(look, some) > 1;
  return { target: of("target"), map: of("map"), draw: of("draw"), position: targets ? of("position") : [] };
}

function targetsPerPlace(look, some) {
  const places = new Map();
  for (const i of some) {
    const key = `${look.columns.source_layer[i]} ${look.columns.position[i]}`;
    places.set(key, (places.get(key) ?? new Set()).add(look.columns.target_layer[i]));
  }
  return [...places.values()].reduce((most, targets) => Math.max(most, targets.size), 1);
}

/** The grid of a prompt. cells[row * columns + column] is the number of a reading, -1 where there is none. Row 0 is at the bottom. */
function gridOf(data, look, chosen) {
  const { columns } = look;
  const all = ofPrompt(look, chosen.prompt);
  const every = chosen.prompt === EVERY;
  const wide = !every && targetsPerPlace(look, all) > 1;
  const some = all.filter(
    (i) =>
      columns.target[i] === chosen.target &&
      columns.map[i] === chosen.map &&
      columns.draw[i] === chosen.draw &&
      (!wide || columns.position[i] === chosen.position),
  );
  const along = every ? columns.prompt : wide ? columns.target_layer : columns.position;
  const rows = sorted(some.map((i) => columns.source_layer[i]));
  const places = sorted(some.map((i) => along[i]));
  const cells = new Int32Array(rows.length * places.length).fill(-1);
  const row = new Map(rows.map((layer, r) => [layer, r]));
  const column = new Map(places.map((place, c) => [place, c]));
  for (const i of some) cells[row.get(columns.source_layer[i]) * places.length + column.get(along[i])] = i;
  const first = new Map();
  for (const i of some) if (!first.has(along[i])) first.set(along[i], i);
  const labels = places.map((place) =>
    wide ? String(place) : { place: String(place), token: visible(text(data, look, "token", first.get(place)) ?? "").trim() },
  );
  const columnName = every ? "token read, and number of its prompt" : wide ? "target layer ℓ*" : "position and token";
  return { rows, places, labels, cells, wide, rowName: "source layer ℓ", columnName };
}

const cellAt = (grid, r, c) => grid.cells[r * grid.places.length + c];

/** Where a reading stands, in words. */
function where(data, look, i) {
  const { columns } = look;
  const [from, to] = [columns.source_layer[i], columns.target_layer[i]];
  const token = visible((text(data, look, "token", i) ?? "").trim());
  return `layer ${from}${from === to ? "" : ` into layer ${to}`}, position ${columns.position[i]} '${token}'`;
}

/** What a screen reader says of a cell. */
function spoken(data, look, metric, i) {
  if (i < 0) return "no such cell";
  const what = state(data, look, metric.name, i);
  if (!["value", "nan", "none"].includes(what)) return `${where(data, look, i)}: ${STATES[what]}`;
  const value = what === "none" ? "not measured" : `${number(look.columns[metric.name][i], metric)} ${UNITS[metric.units]}`;
  const words = shown(data, look, "text", i) || "nothing";
  return `${where(data, look, i)}, says '${words}', ${metric.label} ${value}, ${VERDICTS[verdict(data, look, i)].words}`;
}
const UNITS = { bits: "bits", nats: "nats", ratio: "", probability: "" };
