// What the map shows, to be chosen: part, model, scope, prompt, metric; each only where there is more than one.

function select(name, options, value, onchange) {
  const field = make("select", { id: `choose-${name}`, onchange: (event) => onchange(Number(event.target.value)) });
  options.forEach((words, k) => field.append(make("option", { value: k, selected: k === value }, words)));
  return make("label", { for: `choose-${name}` }, make("span", {}, name), field);
}

function drawControls(data, view, open, show) {
  const { look, chosen } = view;
  const focused = document.activeElement?.id;
  const fields = [];
  let some = data.looks; // those that agree in what was chosen further left
  for (const name of ["part", "model", "scope"]) {
    const values = [...new Set(some.map((one) => one[name]))];
    const before = some;
    if (values.length > 1) {
      fields.push(select(name, values, values.indexOf(look[name]), (k) => {
        const wanted = before.filter((one) => one[name] === values[k]);
        view.look = wanted.find((one) => one.scope === look.scope) ?? wanted[0];
        view.cell = null;
        view.chosen.prompt = undefined;
        show();
      }));
    }
    some = some.filter((one) => one[name] === look[name]);
  }
  if (some.length > 1) fields.push(select("view", some.map((_, k) => String(k + 1)), some.indexOf(look), (k) => ((view.look = some[k]), show())));
  const prompts = promptsOf(look);
  if (prompts.length > 1) {
    const names = prompts.map((prompt) => (prompt === EVERY ? "all, a column each" : `${prompt}: ${short(promptName(data, look, prompt), 60)}`));
    fields.push(select("prompt", names, prompts.indexOf(chosen.prompt), (k) => ((chosen.prompt = prompts[k]), show())));
  }
  const told = { position: (p) => `${p}: ${tokenAt(data, look, chosen.prompt, p)}`, map: (m) => data.strings[m], target: (t) => `${t}: ${short(look.targets[t] ?? "", 40)}` };
  for (const [name, values] of Object.entries(open)) {
    if (values.length > 1) fields.push(select(name, values.map((v) => told[name]?.(v) ?? String(v)), values.indexOf(chosen[name]), (k) => ((chosen[name] = values[k]), show())));
  }
  fields.push(select("metric", look.metrics.map(({ label, units }) => `${label} (${units})`), look.metrics.indexOf(view.metric), (k) => ((view.metric = look.metrics[k]), show())));
  if (!fits(view.grid, width(), tallest())) {
    fields.push(select("cells", ["with words", "the whole map"], view.whole === null ? Number(defaultWhole(view)) : Number(view.whole), (k) => ((view.whole = k === 1), show())));
  }
  $("controls").replaceChildren(...fields);
  if (focused?.startsWith("choose-")) $(focused)?.focus();
}

const promptsOf = (look) => [...(isFlat(look) ? [EVERY] : []), ...look.prompts.number];
const short = (words, most) => (words.length <= most ? words : `${words.slice(0, most - 1)}…`);
const tokenAt = (data, look, prompt, position) => visible((text(data, look, "token", ofPrompt(look, prompt).find((i) => look.columns.position[i] === position)) ?? "").trim());
