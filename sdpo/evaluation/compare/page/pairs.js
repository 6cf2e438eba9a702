// The browser of pairs, and what happens when the page opens. Only one page of the list and one
// pair are in the document at a time, so that thousands of pairs stay quick.

const PAGE = 50;
const NEIGHBOURS_LOADED = 1;
const ORDERS = {
  margin: ["Largest margin", (p, q) => Math.abs(q.difference) - Math.abs(p.difference)],
  a: ["A’s clearest wins", (p, q) => q.difference - p.difference],
  b: ["B’s clearest wins", (p, q) => p.difference - q.difference],
  closest: ["Closest", (p, q) => Math.abs(p.difference) - Math.abs(q.difference)],
  row: ["As in A’s manifest", () => 0],
};

// pairs: of the comparison; found: those that pass the filters, in order; chosen: index into found.
const state = { comparison: null, pairs: [], found: [], chosen: 0, largest: 1 };

const winnerOf = (difference) => (difference > 0 ? SIDE_A : difference < 0 ? SIDE_B : TIE);

function option(value, words) {
  return element("option", { value }, words);
}

function readPairs() {
  const c = state.comparison;
  const metric = byId("metric").value;
  const [a, b] = [data.models[c.a], data.models[c.b]];
  state.pairs = c.rows_a.map((rowA, index) => {
    const rowB = c.rows_b[index];
    const prompts = [a.prompts[rowA], b.prompts[rowB]];
    return {
      index, rowA, rowB, prompts,
      text: prompts.join("\n").toLowerCase(),
      category: c.pair_categories[index],
      difference: a.scores[metric][rowA] - b.scores[metric][rowB],
    };
  });
  state.largest = state.pairs.reduce((most, p) => Math.max(most, Math.abs(p.difference)), 0) || 1;
  state.places = decimals(4, state.largest);
}

// Filter and sort; the chosen pair stays chosen where it still is in the list and is to be kept.
function find(keep = false) {
  const before = keep && state.found[state.chosen];
  const words = byId("text").value.trim().toLowerCase();
  const [winner, category] = [byId("winner").value, byId("category").value];
  state.found = state.pairs
    .filter((pair) =>
      (!words || pair.text.includes(words)) &&
      (winner === "all" || winnerOf(pair.difference) === winner) &&
      (category === "" || pair.category === category.slice(1)))
    .sort(ORDERS[byId("sort").value][1]);
  state.chosen = Math.max(0, before ? state.found.findIndex((p) => p.index === before.index) : 0);
  showList();
  showPair();
}

function marginStrip(difference) {
  const side = winnerOf(difference);
  const length = (56 * Math.abs(difference)) / state.largest;
  return shape(
    "svg",
    { viewBox: "0 0 120 8", "aria-hidden": "true" },
    shape("rect", { class: "track", x: 0, y: 2, width: 120, height: 4, rx: 2 }),
    shape("rect", {
      class: `fill-${side}`, x: difference < 0 ? 60 - length : 60, y: 1,
      width: Math.max(1, length), height: 6,
    }),
    shape("line", { class: "ink-line", x1: 60, x2: 60, y1: 0, y2: 8 }),
  );
}

function showList() {
  const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
  const page = Math.floor(state.chosen / PAGE);
  const shown = state.found.slice(page * PAGE, (page + 1) * PAGE);
  const items = shown.map((pair, i) => {
    const number = page * PAGE + i;
    const side = winnerOf(pair.difference);
    const item = element(
      "li",
      { role: "option", id: `pair-${number}`, "aria-selected": String(number === state.chosen) },
      element("span", { class: "line", dir: "auto" }, pair.prompts[0]),
      element(
        "span", { class: "margin" },
        element("span", {}, tag(side), ` ${signed(pair.difference, state.places)}`),
        marginStrip(pair.difference),
      ),
    );
    item.addEventListener("click", () => choose(number));
    return item;
  });
  const list = byId("list");
  const empty = element("li", { class: "empty", role: "option", "aria-disabled": "true" }, "No pair matches.");
  list.replaceChildren(...(items.length ? items : [empty]));
  list.dataset.page = String(page);
  byId("count").textContent = `${state.found.length} of ${state.pairs.length} pairs`;
  byId("page").textContent = `page ${page + 1} of ${pages}`;
  byId("page-back").disabled = page === 0;
  byId("page-on").disabled = page + 1 >= pages;
  if (items.length) list.setAttribute("aria-activedescendant", `pair-${state.chosen}`);
  else list.removeAttribute("aria-activedescendant");
}

function choose(number) {
  if (!state.found.length) return;
  const before = state.chosen;
  state.chosen = Math.min(state.found.length - 1, Math.max(0, number));
  const list = byId("list");
  if (String(Math.floor(state.chosen / PAGE)) !== list.dataset.page) showList();
  byId(`pair-${before}`)?.setAttribute("aria-selected", "false");
  const item = byId(`pair-${state.chosen}`);
  item.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", item.id);
  // Within the list only: scrollIntoView would move the page as well.
  const [top, bottom] = [item.offsetTop - list.offsetTop, item.offsetTop - list.offsetTop + item.offsetHeight];
  if (top < list.scrollTop) list.scrollTop = top;
  else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
  showPair();
}

function figure(side, model, row, pair) {
  const won = winnerOf(pair.difference) === side;
  const source = model.images[row];
  const image = element("img", { alt: `Image of ${side.toUpperCase()}, ${model.label}`, loading: "lazy", decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= 128));
  const frame = element(source.startsWith("data:") ? "span" : "a", { class: "frame" }, image);
  if (frame.tagName === "A") fill(frame, { href: source, target: "_blank", rel: "noreferrer" }, []);
  image.addEventListener("error", () =>
    frame.replaceChildren(element("span", { class: "broken" }, `The image is not there: ${source.slice(0, 200)}`)));
  image.src = source;
  const by = won ? [`wins by ${fixed(Math.abs(pair.difference), state.places)}`] : [];
  return element(
    "figure", { class: `side-${side}${won ? " won" : ""}` },
    element("figcaption", {}, element("span", {}, tag(side), ` ${model.label}`), ...by),
    frame,
  );
}

function preload(from) {
  const { a, b } = state.comparison;
  for (let i = from - NEIGHBOURS_LOADED; i <= from + NEIGHBOURS_LOADED; i += 1) {
    const pair = state.found[i];
    if (!pair || i === from) continue;
    for (const source of [data.models[a].images[pair.rowA], data.models[b].images[pair.rowB]]) {
      new Image().src = source;
    }
  }
}

function showPair() {
  const pair = state.found[state.chosen];
  byId("previous").disabled = !pair || state.chosen === 0;
  byId("next").disabled = !pair || state.chosen + 1 >= state.found.length;
  byId("prompt-b").hidden = true;
  if (!pair) {
    byId("position").textContent = "No pair matches";
    byId("prompt").textContent = "";
    byId("images").replaceChildren();
    byId("scores").replaceChildren();
    return;
  }
  const [a, b] = [data.models[state.comparison.a], data.models[state.comparison.b]];
  const category = pair.category === null ? "" : ` · ${pair.category}`;
  byId("position").textContent = `${state.chosen + 1} of ${state.found.length}${category}`;
  byId("prompt").textContent = pair.prompts[0];
  if (pair.prompts[1] !== pair.prompts[0]) {
    byId("prompt-b").hidden = false;
    byId("prompt-b").textContent = `B’s prompt: ${pair.prompts[1]}`;
  }
  byId("images").replaceChildren(
    figure(SIDE_A, a, pair.rowA, pair), figure(SIDE_B, b, pair.rowB, pair));
  const rows = data.metrics.map(({ name, label }) => {
    const [scoreA, scoreB] = [a.scores[name][pair.rowA], b.scores[name][pair.rowB]];
    const places = decimals(4, scoreA, scoreB);
    return [
      rowHead(label), cell(fixed(scoreA, places)), cell(fixed(scoreB, places)),
      cell(`${signed(scoreA - scoreB, places)} `, tag(winnerOf(scoreA - scoreB))),
    ];
  });
  const scores = byId("scores");
  table(scores, ["Metric", tag(SIDE_A), tag(SIDE_B), [tag(SIDE_A), " − ", tag(SIDE_B)]], rows);
  const place = data.metrics.findIndex(({ name }) => name === byId("metric").value);
  scores.tBodies[0].rows[place].classList.add("chosen");
  preload(state.chosen);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  if (event.key === "Escape" && target === byId("text")) target.blur();
  if (target.closest("input, select, textarea")) return;
  const inList = target.closest("#list") !== null;
  const moves = { j: 1, k: -1 };
  // A table that is scrolled by keys keeps the arrows to itself.
  if (!target.closest(".scroll")) Object.assign(moves, { ArrowRight: 1, ArrowLeft: -1 });
  if (inList) {
    const all = state.found.length;
    Object.assign(moves, { ArrowDown: 1, ArrowUp: -1, Home: -all, End: all, PageUp: -PAGE, PageDown: PAGE });
  }
  if (event.key in moves) choose(state.chosen + moves[event.key]);
  else if (event.key === "/") byId("text").focus();
  else return;
  event.preventDefault();
}

function turn(pages) {
  choose((Math.floor(state.chosen / PAGE) + pages) * PAGE);
}

function modelName(side, label) {
  return element("span", {}, tag(side), ` ${label}`);
}

function open(comparison) {
  state.comparison = comparison;
  const [a, b] = [data.models[comparison.a].label, data.models[comparison.b].label];
  byId("title").replaceChildren(
    modelName(SIDE_A, a), element("span", { class: "versus" }, " against "), modelName(SIDE_B, b));
  const by = data.align === "index" ? "row by row" : "by prompt, repeated prompts in their order";
  byId("about").textContent =
    `${comparison.rows_a.length} pairs, aligned ${by}. A tie counts as ` +
    `${data.ties === "half" ? "half a win" : "a loss"}.`;
  byId("winner").replaceChildren(
    option("all", "All"), option(SIDE_A, `A wins (${a})`), option(SIDE_B, `B wins (${b})`),
    option(TIE, "Ties"));
  const categories = [...new Set(comparison.pair_categories.filter((name) => name !== null))].sort();
  byId("category-field").hidden = categories.length === 0;
  byId("category").replaceChildren(
    option("", "All"), ...categories.map((name) => option(`=${name}`, name)));
  for (const button of document.querySelectorAll("[data-pair]")) {
    const models = button.dataset.pair.split("-").map(Number);
    const chosen = models.includes(comparison.a) && models.includes(comparison.b);
    button.setAttribute("aria-pressed", String(chosen));
  }
  showSummary(comparison);
  showCharts(comparison);
  showCategories(comparison);
  showLeftovers(comparison);
  readPairs();
  find();
}

function start() {
  const picker = byId("comparison");
  data.comparisons.forEach((c, i) => {
    picker.append(option(i, `${data.models[c.a].label} against ${data.models[c.b].label}`));
  });
  const pick = (i) => {
    picker.value = String(i);
    open(data.comparisons[i]);
  };
  picker.addEventListener("change", () => pick(Number(picker.value)));
  // Either triangle of the matrix leads to the same comparison.
  showMatrices((i, j) => pick(data.comparisons.findIndex(
    (c) => (c.a === i && c.b === j) || (c.a === j && c.b === i))));
  byId("notes").hidden = data.notes.length === 0;
  byId("notes").append(...data.notes.map((note) => element("li", {}, note)));
  byId("metric").append(...data.metrics.map(({ name, label }) => option(name, label)));
  byId("sort").append(...Object.entries(ORDERS).map(([name, [words]]) => option(name, words)));
  byId("method").textContent =
    `Win rate of A: (wins${data.ties === "half" ? " + ties / 2" : ""}) / pairs. Intervals: percentile ` +
    `bootstrap over pairs, ${data.resamples} resamples; too narrow for a handful of pairs or where ` +
    "one side wins nearly all. Sign test: exact, two-sided, ties dropped.";
  byId("metric").addEventListener("change", () => { readPairs(); find(true); });
  for (const id of ["winner", "category", "sort"]) byId(id).addEventListener("change", () => find());
  byId("text").addEventListener("input", () => find());
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => choose(state.chosen - 1));
  byId("next").addEventListener("click", () => choose(state.chosen + 1));
  byId("page-back").addEventListener("click", () => turn(-1));
  byId("page-on").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", onKey);
  pick(0);
}

start();
