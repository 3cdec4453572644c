// The page of `asyncdapo watch --web`. Whatever comes from a run is shown as text: `node` sets nothing as markup.
"use strict";
const COLORS = ["#2f6db3", "#d9742b", "#3c8c4d", "#b3478a", "#7a5cc0", "#a3842b", "#2a9aa0", "#c23b3b", "#8a8f98", "#6b4a2f", "#5a8fd6", "#9ab83c"];
const PALE = { idle: "#c9ced6", lease: "#c9ced6", wait: "#c9ced6", other: "#e3e6ea" }; // nothing is done in these states
const DASHES = ["solid", "dot", "dash", "dashdot"];
const POLL_MS = 2000;
const by = (id) => document.getElementById(id);
const state = { runs: [], charts: [], gantts: [], shown: 0, over: "step", seen: new Set() };

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function short(number, digits = 3) {
  if (number === null || number === undefined) return "";
  return Number.isInteger(number) ? number.toLocaleString("en") : number.toPrecision(digits);
}

// ------------------------------------------------------------------------------------------------------------- what it does now

function showRuns() {
  const run = state.runs[state.shown];
  document.title = `${run.name}: ${run.step}/${run.total_steps}`;
  by("tabs").replaceChildren(...state.runs.map((each, number) => {
    const tab = node("button", { onclick: () => choose(number) }, node("i"), `${each.name}, ${each.state}`);
    tab.firstChild.style.background = COLORS[number % COLORS.length];
    tab.title = each.dir;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-selected", number === state.shown);
    return tab;
  }));
  const left = run.time_left ? `, about ${run.time_left} left` : "";
  by("progress").replaceChildren(
    node("progress", { value: run.step, max: run.total_steps }),
    `step ${run.step} of ${run.total_steps}${left}`);
  by("verdict").textContent = run.verdict ? `Verdict: ${run.verdict}` : "";
  by("alarms").replaceChildren(...run.alarms.map((alarm) => node("li", {}, alarm)));
  by("step").max = run.step;
  by("notes").textContent = run.notes.slice(-12).reverse().join("\n");
  showProcesses(run.processes);
}

function showProcesses(processes) {
  const headings = ["process", "host", "pid", "state", "behind", "memory, MiB", "groups of the last batch", "tokens of it", "tokens per s", "slots in use", "waiting", "heartbeat, s ago"];
  const rows = processes.map((each) => [
    each.name, each.host, String(each.pid), each.state, each.behind, short(each.memory_mib && Math.round(each.memory_mib)),
    short(each.groups), short(each.tokens),
    short(each.tokens_per_s && Math.round(each.tokens_per_s)), short(each.running), short(each.waiting), short(each.heard_ago_s && Math.round(each.heard_ago_s)),
  ]);
  fill(by("processes"), headings, rows);
}

function fill(table, headings, rows) {
  const cells = (tag, texts) => texts.map((text) => node(tag, {}, text));
  table.replaceChildren(
    node("thead", {}, node("tr", {}, ...cells("th", headings))),
    node("tbody", {}, ...rows.map((row) => node("tr", {}, ...cells("td", row)))));
}

function choose(number) {
  state.shown = number;
  showRuns();
  redraw();
}

// ------------------------------------------------------------------------------------------------------------------------ charts

const plotly = new Promise((ready) => {
  if (window.Plotly) ready();
  by("plotly").addEventListener("load", ready);
});
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const number = Number(entry.target.dataset.number);
    if (!entry.isIntersecting) state.seen.delete(number);
    else if (!state.seen.has(number)) {
      state.seen.add(number);
      draw(entry.target, number);
    }
  }
});

function makeCharts() {
  by("charts").replaceChildren(...state.charts[0].charts.map((chart, number) => {
    const figure = node("figure", {}, node("figcaption", {}, chart.title), node("div"));
    figure.dataset.number = number;
    watcher.observe(figure);
    return figure;
  }));
  const figure = node("figure", { className: "wide" }, node("figcaption", {}, "What processes did in the latest steps"), node("div"));
  figure.dataset.number = state.charts[0].charts.length;
  watcher.observe(figure);
  by("charts").append(figure);
}

function redraw() {
  for (const figure of by("charts").children) {
    const number = Number(figure.dataset.number);
    if (state.seen.has(number)) draw(figure, number);
  }
}

function traces(number) {
  const several = state.charts.length > 1;
  return state.charts.flatMap((data, run) => {
    const chart = data.charts[number];
    if (chart.look === "stack" && run !== state.shown) return [];
    const stands = (line) => chart.look === "lines" || chart.columns.some((column) => column[line] !== null);
    const only = (column) => column.filter((_, line) => stands(line));
    return chart.labels.flatMap((label, place) => {
      const y = only(chart.columns[place]);
      if (!y.some((value) => value !== null && (chart.look === "lines" || value !== 0))) return [];
      const name = several && chart.look === "lines" ? `${state.runs[run].name}: ${label}` : label;
      const color = COLORS[(several && chart.look === "lines" ? run : place) % COLORS.length];
      const few = y.filter((value) => value !== null).length < 40;
      return [{
        x: only(data[state.over]), y, name, customdata: only(data.step).map((step) => [run, step]), connectgaps: true,
        mode: few && chart.look === "lines" ? "lines+markers" : "lines",
        line: { color, width: chart.look === "stack" ? 0.5 : 1.6, dash: several && chart.look === "lines" ? DASHES[place % DASHES.length] : "solid" },
        ...(chart.look === "stack" ? { stackgroup: "all", fillcolor: `${color}b0` } : {}),
        hovertemplate: "%{y:.4g}",
      }];
    });
  });
}

function overWhat() {
  const { lines, step } = state.charts[state.shown];
  const means = lines > step.length ? `, a point is the mean of ${Math.ceil(lines / step.length)}` : "";
  return state.over === "step" ? `train step${means}` : `training time, s${means && `${means} steps`}`;
}

function bars() {
  const kinds = new Map();
  for (const row of [...state.gantts[state.shown].rows].reverse()) {
    for (const [name, began, ended] of row.bars) {
      const kind = name.replace(/ \d+$/, "");
      if (!kinds.has(kind)) kinds.set(kind, { type: "bar", orientation: "h", name: kind, base: [], x: [], y: [], customdata: [], hovertemplate: "%{customdata}", marker: { color: PALE[kind] || COLORS[kinds.size % COLORS.length] } });
      const drawn = kinds.get(kind);
      drawn.base.push(began);
      drawn.x.push(ended - began);
      drawn.y.push(row.name);
      drawn.customdata.push(`${name}: ${short(ended - began)} s`);
    }
  }
  return [...kinds.values()];
}

function ganttLayout() {
  const { steps, rows } = state.gantts[state.shown];
  const beginning = ([, at]) => ({ type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { width: 1, dash: "dot" } });
  const label = ([step, at]) => ({ x: at, y: 1, yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, text: `${step}` });
  return {
    barmode: "overlay", bargap: 0.25, hovermode: "closest", height: 190 + 24 * rows.length, shapes: steps.map(beginning),
    annotations: steps.map(label), names: rows.map((row) => row.name).reverse(), x: `s since step ${steps[0][0]} began`, y: "process",
  };
}

async function draw(figure, number) {
  await plotly;
  const gantt = number === state.charts[0].charts.length;
  const drawn = gantt ? bars() : traces(number);
  const place = figure.lastChild;
  place.className = drawn.length ? "" : "none";
  if (!drawn.length) {
    Plotly.purge(place);
    place.textContent = "not measured in this run";
    return;
  }
  if (!place.data) place.textContent = "";
  const style = getComputedStyle(document.body);
  const [text, grid] = ["--text", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = (title) => ({ title: { text: title, standoff: 6, font: { size: 12 } }, gridcolor: grid, zeroline: false, automargin: true });
  const own = gantt ? ganttLayout() : { x: overWhat(), y: state.charts[0].charts[number].axis };
  const layout = {
    margin: { l: 50, r: 12, t: gantt ? 24 : 8, b: 40 }, font: { color: text, size: 11 }, hovermode: "x unified", showlegend: true,
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", hoverlabel: { bgcolor: style.getPropertyValue("--card").trim() },
    legend: { orientation: "h", y: -0.28, yanchor: "top", font: { size: 10.5 } },
    uirevision: state.over, ...own, xaxis: axis(own.x), yaxis: { ...axis(own.y), ...(gantt ? { categoryarray: own.names } : {}) },
  };
  if (gantt) place.style.height = `${own.height}px`;
  await Plotly.react(place, drawn, layout, { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] });
  place.removeAllListeners("plotly_click");
  if (!gantt) place.on("plotly_click", (event) => openStep(...event.points[0].customdata));
}

// ----------------------------------------------------------------------------------------------------------------------- samples

async function openStep(run, step) {
  by("samples").hidden = false;
  by("of-step").textContent = `${state.runs[run].name}: groups in the batch of step ${step}`;
  by("group").replaceChildren();
  const groups = await said(() => get(`groups?run=${run}&step=${step}`));
  const headings = ["prompt", "reward", "accuracy", "tokens", "cut off", "versions", "worker", "generated in, s", "tokens kept"];
  fill(by("groups"), headings, (groups || []).map((each) => [
    String(each.prompt_id), short(each.reward_mean), short(each.acc_mean), short(each.tokens), String(each.truncated),
    [...new Set([each.min_version, each.max_version])].join(" to "), String(each.worker), short(each.generate_s), each.kept ? "yes" : "no",
  ]));
  [...by("groups").tBodies[0].rows].forEach((row, place) => {
    row.tabIndex = 0;
    row.onclick = () => openGroup(run, groups[place], row);
    row.onkeydown = (event) => { if (event.key === "Enter") row.click(); };
  });
  if (groups && !groups.length) by("group").textContent = "No groups: step 0 is an evaluation, and later steps may be undone.";
}

async function openGroup(run, group, row) {
  for (const other of row.parentNode.rows) other.setAttribute("aria-current", other === row);
  const page = await said(() => get(`group?run=${run}&id=${group.group_id}`));
  if (!page) return;
  const completion = node("div");
  const buttons = page.completions.map((each, sample) => node("button", {
    className: each.metrics.acc > 0 ? "right" : "wrong",
    onclick: () => press(sample),
  }, `${each.metrics.acc > 0 ? "✓" : "✗"} ${short(each.reward)}`));
  const press = (sample) => {
    buttons.forEach((button, place) => button.setAttribute("aria-pressed", place === sample));
    openCompletion(run, group, page.completions[sample], sample, completion);
  };
  by("group").replaceChildren(
    node("h2", {}, `Prompt ${page.prompt_id}`), node("pre", {}, page.prompt),
    node("h2", {}, "Completions and their rewards"), node("div", { className: "buttons" }, ...buttons), completion);
  by("group").scrollIntoView({ block: "nearest" });
  press(0);
}

async function openCompletion(run, group, about, sample, place) {
  const pieces = await said(() => get(`completion?run=${run}&id=${group.group_id}&sample=${sample}`));
  if (!pieces) return;
  const metrics = Object.entries(about.metrics).map(([name, value]) => `${name} ${short(value)}`).join(", ");
  const text = node("pre");
  const paint = (what) => text.replaceChildren(...pieces.map((piece) => token(piece, what, pieces)));
  const known = pieces.some((piece) => piece.ratio !== null);
  const select = node("select", { onchange: () => paint(select.value) },
    node("option", { value: "logprob" }, "log-prob: the redder, the less likely"),
    ...(known ? [node("option", { value: "ratio" }, "ratio of the learner to the engine: red below 1, green above")] : []),
    node("option", { value: "version" }, "version of the weights"), node("option", { value: "" }, "nothing"));
  place.replaceChildren(
    node("p", { className: "dim" }, `${about.tokens} tokens, ${about.turns} turn${about.turns > 1 ? "s" : ""}, ended by ${about.finish_reason}; ${metrics}`),
    node("label", {}, "colour: ", select), text);
  paint("logprob");
}

function token(piece, what, pieces) {
  const made = node("span", {}, piece.text);
  if (piece.logprob === null) {
    made.className = "observed";
    return made;
  }
  const ratio = piece.ratio === null ? "" : `, ratio ${short(piece.ratio, 4)}`;
  made.title = `log-prob ${short(piece.logprob)} nats, version ${piece.version}${ratio}`;
  if (what === "logprob") made.style.background = `rgb(220 60 40 / ${Math.min(0.75, -piece.logprob / 6)})`;
  if (what === "ratio" && piece.ratio !== null) {
    const strength = Math.min(0.75, Math.abs(Math.log(piece.ratio)) / 0.3);
    made.style.background = piece.ratio < 1 ? `rgb(220 60 40 / ${strength})` : `rgb(30 150 90 / ${strength})`;
  }
  if (what === "version") made.style.background = `hsl(${(piece.version * 67) % 360} 70% 50% / 0.3)`;
  return made;
}

async function said(ask) {
  try {
    return await ask();
  } catch (error) {
    by("group").textContent = error.message;
    return null;
  }
}

// -------------------------------------------------------------------------------------------------------------------------- start

async function refresh() {
  const before = state.runs.map((run) => run.lines);
  state.runs = await get("runs");
  showRuns();
  if (state.runs.every((run, number) => run.lines === before[number])) return;
  state.charts = await Promise.all(state.runs.map((_, number) => get(`charts?run=${number}`)));
  state.gantts = await Promise.all(state.runs.map((_, number) => get(`gantt?run=${number}`)));
  if (!by("charts").children.length) makeCharts();
  redraw();
}

async function follow() {
  try {
    await refresh();
  } catch (error) {
    by("progress").textContent = `asyncdapo watch has ended (${error.message})`;
  }
  setTimeout(follow, POLL_MS);
}

by("over").onchange = () => { state.over = by("over").value; redraw(); };
by("step").onchange = () => openStep(state.shown, Number(by("step").value));
by("close").onclick = () => { by("samples").hidden = true; };
document.addEventListener("keydown", (event) => { if (event.key === "Escape") by("samples").hidden = true; });
follow();
