// The page put together: what is chosen, what is shown, and the keys.

const PAGE_ROWS = 10; // that PgUp and PgDn walk

async function begin() {
  const data = await decode();
  if (!data.looks.length) throw new Error("this page holds no readings");
  const view = { look: data.looks[0], metric: data.looks[0].metrics[0], chosen: {}, cell: null, hover: null, kept: false, whole: null, scroll: { x: 0, y: 0 } };
  restore(data, view);
  const show = () => refresh(data, view, show);
  wire(data, view, show);
  show();
  const go = (look, i) => {
    const { columns } = look;
    view.look = look;
    const every = view.chosen.prompt === EVERY && isFlat(look);
    for (const name of ["prompt", "target", "draw", "map", "position"]) view.chosen[name] = columns[name][i];
    if (every) view.chosen.prompt = EVERY;
    show();
    const at = view.grid.cells.indexOf(i);
    if (at < 0) return;
    view.cell = { r: Math.floor(at / view.grid.places.length), c: at % view.grid.places.length };
    $("map").scrollIntoView();
    $("grid").focus({ preventScroll: true });
    moved(data, view, true);
  };
  const table = () => fillTable(data, view.look, go);
  tableControls(data, table);
  table();
  view.table = table;
  document.documentElement.dataset.ready = "yes";
}

// ------------------------------------------------------------------------------------------------------------ choosing

/** Make what is chosen possible, and show it. */
function refresh(data, view, show) {
  const { look, chosen } = view;
  const flat = isFlat(look);
  if (!look.first.has(chosen.prompt) && !(flat && chosen.prompt === EVERY)) chosen.prompt = flat ? EVERY : look.prompts.number[0];
  const open = choices(look, chosen.prompt);
  for (const [name, values] of Object.entries(open)) {
    if (!values.includes(chosen[name])) chosen[name] = name === "position" ? values.at(-1) : values[0];
  }
  if (!look.metrics.includes(view.metric)) view.metric = look.metrics.find(({ name }) => name === view.metric.name) ?? look.metrics[0];
  view.grid = gridOf(data, look, chosen);
  view.scale = scaleOf(look, view.metric);
  view.kept = false;
  const { grid } = view;
  if (!view.cell) view.cell = firstAbove(data, view);
  view.cell = { r: Math.max(0, Math.min(view.cell.r, grid.rows.length - 1)), c: Math.max(0, Math.min(view.cell.c, grid.places.length - 1)) };
  view.hover = null;
  drawControls(data, view, open, show);
  const name = chosen.prompt === EVERY ? [`${look.prompts.number.length.toLocaleString("en")} prompts`] : ["Prompt ", said(`“${promptName(data, look, chosen.prompt)}”`)];
  $("prompt-text").replaceChildren(...name, ...(look.targets[chosen.target] ? [" through ", said(`“${look.targets[chosen.target]}”`)] : []));
  size(data, view);
  legend(data, view);
  moved(data, view, false);
  remember(data, view);
  if (view.table && view.shown !== look) view.table();
  view.shown = look;
}

/** Where to begin: the reading that is most above its controls, else the first. */
function firstAbove(data, view) {
  const { grid, look } = view;
  let best = { r: grid.rows.length - 1, c: grid.places.length - 1, value: -Infinity };
  grid.cells.forEach((i, at) => {
    const value = i >= 0 && verdict(data, look, i) === "above" ? (look.columns.bits_over_others[i] ?? 0) : -Infinity;
    if (value > best.value) best = { r: Math.floor(at / grid.places.length), c: at % grid.places.length, value };
  });
  return best;
}

// ------------------------------------------------------------------------------------------------------------- showing

const width = () => Math.max(200, $("scroller").clientWidth || 600);
const tallest = () => Math.max(320, Math.round(innerHeight * 0.78));
/** Long prompts are first seen as a whole. */
const defaultWhole = (view) => view.grid.places.length > 80;

function size(data, view) {
  const whole = view.whole ?? defaultWhole(view);
  view.fits = fits(view.grid, width(), tallest());
  view.drawnWhole = whole && !view.fits;
  view.sizes = layout(view.grid, width(), tallest(), view.drawnWhole);
  const scroller = $("scroller");
  scroller.style.height = `${view.sizes.window.height + (view.sizes.full.width > width() ? 14 : 0)}px`;
  $("sizer").style.width = `${Math.max(view.sizes.full.width, 0)}px`;
  $("sizer").style.height = `${view.sizes.full.height}px`;
  view.scroll = { x: scroller.scrollLeft, y: scroller.scrollTop };
}

/** After the cell changed: bring it into sight, paint, show its card and say it. */
function moved(data, view, speak) {
  const { grid, cell } = view;
  const scroller = $("scroller");
  const { left, bottom, window: size } = view.sizes;
  const box = boxOf(view, cell);
  if (box.x < left) scroller.scrollLeft += box.x - left;
  if (box.x + box.width > size.width) scroller.scrollLeft += box.x + box.width - size.width + EDGE.right;
  if (box.y < EDGE.top) scroller.scrollTop += box.y - EDGE.top;
  if (box.y + box.height > size.height - bottom) scroller.scrollTop += box.y + box.height - size.height + bottom;
  view.scroll = { x: scroller.scrollLeft, y: scroller.scrollTop };
  const i = cellAt(grid, cell.r, cell.c) ?? -1;
  const words = spoken(data, view.look, view.metric, i);
  $("grid").setAttribute("aria-rowcount", grid.rows.length);
  $("grid").setAttribute("aria-colcount", grid.places.length);
  $("grid-name").textContent = `${view.metric.label} by ${grid.rowName} and ${grid.columnName}`;
  $("active-row").setAttribute("aria-rowindex", grid.rows.length - cell.r);
  $("active").setAttribute("aria-colindex", cell.c + 1);
  $("active-header").textContent = `layer ${grid.rows[cell.r]}`;
  $("active").textContent = words;
  if (speak) $("live").textContent = words;
  showCard(data, view, i);
  redraw(data, view);
  remember(data, view);
}

function showCard(data, view, i) {
  $("card").replaceChildren(...cardOf(data, view.look, i).filter(Boolean));
  $("card").classList.toggle("kept", view.kept);
}

function redraw(data, view) {
  paint(data, view);
  if ($("grid-details").open) $("grid-table").replaceChildren(gridTable(data, view));
}

function legend(data, view) {
  const { metric, scale, grid, look } = view;
  const strip = make("canvas", { width: 256, height: 1, class: "strip", role: "img", "aria-label": `colours from ${number(scale.low, metric)} to ${number(scale.high, metric)} ${UNITS[metric.units]}` });
  const pen = strip.getContext("2d");
  scale.colours.forEach((colour, k) => ((pen.fillStyle = `rgb(${colour})`), pen.fillRect(k, 0, 1, 1)));
  const low = `${scale.below ? "≤ " : ""}${number(scale.low, metric)}`;
  const high = `${scale.above ? "≥ " : ""}${number(scale.high, metric)}`;
  const units = metric.units === metric.label ? "" : ` (${metric.units})`;
  const marks = [...new Set([...grid.cells].filter((i) => i >= 0).map((i) => verdict(data, look, i)))].filter(Boolean);
  const states = [...new Set([...grid.cells].map((i) => state(data, look, metric.name, i)))].filter((what) => what !== "value");
  const clip = scale.below || scale.above ? "; colours end at the 2nd and 98th percentile" : "";
  $("legend").replaceChildren(
    make("span", { class: "scale" }, make("b", {}, `${metric.label}${units}`), make("span", { class: "n" }, low), strip, make("span", { class: "n" }, high)),
    ...marks.map((kind) => make("span", {}, make("span", { class: "mark", "aria-hidden": "true" }, VERDICTS[kind].mark), VERDICTS[kind].words)),
    ...states.map((what) => make("span", {}, swatch(what), STATES[what])),
    make("span", { class: "hint" }, `range of ${scale.count.toLocaleString("en")} readings of this view${clip}`),
  );
}

function swatch(what) {
  const sharp = globalThis.devicePixelRatio || 1;
  const canvas = make("canvas", { width: 26 * sharp, height: 16 * sharp, class: "swatch", "aria-hidden": "true" });
  const pen = canvas.getContext("2d");
  pen.scale(sharp, sharp);
  fillState(pen, what, 0, 0, 26, 16, theme());
  return canvas;
}

// ---------------------------------------------------------------------------------------------------------------- keys

function wire(data, view, show) {
  const [grid, scroller, canvas, card] = [$("grid"), $("scroller"), $("canvas"), $("card")];
  const walk = (r, c) => {
    const { rows, places } = view.grid;
    view.cell = { r: Math.max(0, Math.min(rows.length - 1, r)), c: Math.max(0, Math.min(places.length - 1, c)) };
    view.hover = null;
    view.kept = false;
    moved(data, view, true);
  };
  grid.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey) return;
    const { r, c } = view.cell;
    const [top, end] = [view.grid.rows.length - 1, view.grid.places.length - 1];
    const far = event.ctrlKey;
    const moves = {
      ArrowUp: [r + 1, c], ArrowDown: [r - 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
      Home: [far ? top : r, 0], End: [far ? 0 : r, end], PageUp: [r + PAGE_ROWS, c], PageDown: [r - PAGE_ROWS, c],
    };
    if (moves[event.key]) walk(...moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") {
      view.kept = true;
      moved(data, view, false);
      card.focus();
      card.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Escape") {
      view.kept = false;
      moved(data, view, false);
    } else if (event.key === "[" || event.key === "]") {
      const prompts = promptsOf(view.look);
      const k = prompts.indexOf(view.chosen.prompt) + (event.key === "]" ? 1 : -1);
      if (k < 0 || k >= prompts.length) return;
      view.chosen.prompt = prompts[k];
      show();
      const name = prompts[k] === EVERY ? "all prompts" : `prompt ${prompts[k]}: ${promptName(data, view.look, prompts[k])}`;
      $("live").textContent = `${name}. ${spoken(data, view.look, view.metric, cellAt(view.grid, view.cell.r, view.cell.c))}`;
    } else if (event.key === "m" && !event.ctrlKey) {
      const { metrics } = view.look;
      view.metric = metrics[(metrics.indexOf(view.metric) + 1) % metrics.length];
      show();
      moved(data, view, true);
    } else return;
    event.preventDefault();
  });
  card.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    view.kept = false;
    showCard(data, view, cellAt(view.grid, view.cell.r, view.cell.c));
    grid.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "?" && !event.target.closest("input, select, textarea")) $("keys").showModal();
  });
  $("show-keys").addEventListener("click", () => $("keys").showModal());
  $("copy-grid").addEventListener("click", () => copy(gridTsv(data, view), $("copied")));
  $("grid-details").addEventListener("toggle", () => redraw(data, view));
  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    return hit(view, event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("pointermove", (event) => {
    const at = under(event);
    if (at?.r === view.hover?.r && at?.c === view.hover?.c) return;
    view.hover = at;
    if (!view.kept) showCard(data, view, at ? cellAt(view.grid, at.r, at.c) : cellAt(view.grid, view.cell.r, view.cell.c));
    requestAnimationFrame(() => paint(data, view));
  });
  canvas.addEventListener("pointerleave", () => {
    view.hover = null;
    if (!view.kept) showCard(data, view, cellAt(view.grid, view.cell.r, view.cell.c));
    requestAnimationFrame(() => paint(data, view));
  });
  canvas.addEventListener("click", (event) => {
    const at = under(event);
    grid.focus({ preventScroll: true });
    if (at) walk(at.r, at.c);
  });
  scroller.addEventListener("scroll", () => {
    view.scroll = { x: scroller.scrollLeft, y: scroller.scrollTop };
    requestAnimationFrame(() => redraw(data, view));
  });
  const fresh = () => requestAnimationFrame(() => ((view.scale = scaleOf(view.look, view.metric)), size(data, view), legend(data, view), redraw(data, view)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", fresh);
  addEventListener("resize", () => requestAnimationFrame(show));
}

function tableControls(data, table) {
  const set = (change) => (event) => (change(event.target), (all.page = 0), table());
  let waiting;
  const search = make("input", { type: "search", id: "find", placeholder: "word, token or prompt", oninput: (event) => (clearTimeout(waiting), (waiting = setTimeout(() => set((field) => (all.words = field.value))(event), 150))) });
  const kinds = ["", "above", "same", "not run", "failed", "skipped", "waiting"];
  const pick = make("select", { id: "kind", onchange: set((field) => (all.kind = field.value)) }, ...kinds.map((kind) => make("option", { value: kind }, kind || "all")));
  const fields = [make("label", { for: "find" }, make("span", {}, "find"), search), make("label", { for: "kind" }, make("span", {}, "verdict or status"), pick)];
  if (data.looks.length > 1) {
    const box = make("input", { type: "checkbox", id: "everywhere", onchange: set((field) => (all.everywhere = field.checked)) });
    fields.push(make("label", { for: "everywhere", class: "check" }, box, make("span", {}, "of all views, not only the one in the map")));
  }
  $("table-controls").replaceChildren(...fields);
  $("table-controls").addEventListener("submit", (event) => event.preventDefault());
  $("controls").addEventListener("submit", (event) => event.preventDefault());
}

// ------------------------------------------------------------------------------------------------- the page's address

/** What is shown stands in the address behind #, as numbers only, so that reloading shows it again. */
function remember(data, view) {
  const { chosen, cell } = view;
  const parts = [data.looks.indexOf(view.look), data.metrics.indexOf(data.metrics.find(({ name }) => name === view.metric.name)), chosen.prompt, chosen.target, chosen.map, chosen.draw, chosen.position ?? "", cell.r, cell.c];
  clearTimeout(view.later);
  view.later = setTimeout(() => history.replaceState(null, "", `#at=${parts.join(",")}`), 250);
}

function restore(data, view) {
  const parts = /^#at=([-\d,]+)$/.exec(location.hash)?.[1].split(",").map((part) => (part === "" ? undefined : Number(part)));
  if (!parts || !data.looks[parts[0]]) return;
  view.look = data.looks[parts[0]];
  view.metric = data.metrics[parts[1]] ?? view.metric;
  view.chosen = { prompt: parts[2], target: parts[3], map: parts[4], draw: parts[5], position: parts[6] };
  if (parts.length === 9 && parts[8] !== undefined) view.cell = { r: parts[7], c: parts[8] };
}

begin().catch((error) => {
  $("trouble").hidden = false;
  $("trouble").textContent =
    typeof DecompressionStream === "undefined"
      ? "This browser cannot unpack the readings (it has no DecompressionStream); a version of 2023 or newer can. The rest of the page is complete."
      : `The readings cannot be shown: ${error.message}`;
  document.documentElement.dataset.ready = "no";
});
