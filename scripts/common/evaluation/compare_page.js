"use strict";
// The texts of the page: searched, filtered, sorted, and drawn a few at a time, so that thousands of prompts stay quick.
// data: {runs: [name], golden: index or -1, metrics: [name], lower: [name], more: [name], labels: [[label, kind]],
//   items: [{id, turns: [[role, text]],
//     cards: [[run, [text or [text, label index]], [score or null], stopped, thought?]]}]}
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const STEP = 20;
let shown = [], drawn = 0, current = -1;

// What a model wrote enters the page as text only, never as markup.
function add(parent, tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return parent.appendChild(made);
}

const plain = card => card[1].map(part => (typeof part === "string" ? part : part[0])).join("");
const digits = value => (Number.isInteger(value) ? String(value) : value.toFixed(3));

function draw(item) {
  const box = add(at("items"), "section", "", "item");
  box.id = "p-" + item.id;
  const link = add(box, "a", "link", "link");
  link.href = "#p-" + item.id;
  for (const [role, text] of item.turns) {
    const turn = add(box, "p", "", "turn");
    if (item.turns.length > 1) add(turn, "small", role + ": ");
    turn.append(text);
  }
  const cards = add(box, "div", "", "cards");
  for (const [run, parts, scores, stopped, thought] of item.cards) {
    const card = add(cards, "div", "", run === data.golden ? "card golden" : "card");
    const head = add(card, "h4", data.runs[run] + " ");
    if (!stopped) add(head, "span", "did not stop");
    if (thought) {
      const fold = add(card, "details");
      add(fold, "summary", "thinking");
      add(fold, "p", thought, "thought");
    }
    const text = add(card, "p", "", "text");
    for (const part of parts) {
      if (typeof part === "string") { text.append(part); continue; }
      const [label, kind] = data.labels[part[1]];
      add(text, "mark", part[0], kind).title = label;
    }
    const line = add(card, "p", "", "scores");
    scores.forEach((value, i) => {
      if (value === null) return;
      const name = data.metrics[i];
      add(line, "span", `${name} ${digits(value)}`, data.more.includes(name) ? "more" : "");
      line.append(" ");
    });
  }
}

function drawMore() {
  const end = Math.min(drawn + STEP, shown.length);
  for (; drawn < end; drawn++) draw(shown[drawn]);
}

// A rule: "all", "cut" (did not stop), "label:INDEX" (a marked fault), "metric:INDEX" (the worst value of a measure).
function keeps(card, rule) {
  const [kind, place] = rule.split(":");
  if (kind === "cut") return !card[3];
  if (kind === "label") return card[1].some(part => typeof part !== "string" && part[1] === Number(place));
  if (kind === "metric") return card[2][place] === (data.lower.includes(data.metrics[place]) ? 1 : 0);
  return true;
}

function update() {
  const words = at("search").value.trim().toLowerCase(), rule = at("rule").value, order = at("order").value;
  const run = at("run").value === "any" ? -1 : Number(at("run").value);
  const cardsOf = item => item.cards.filter(card => (run < 0 ? card[0] !== data.golden : card[0] === run));
  shown = data.items.filter(item => cardsOf(item).some(card => keeps(card, rule)) && (!words || words === "#" + item.id ||
    item.turns.some(turn => turn[1].toLowerCase().includes(words)) ||
    item.cards.some(card => plain(card).toLowerCase().includes(words))));
  if (order !== "file") {
    const [place, sign] = order.split(":").map(Number);
    const value = item => {
      const known = cardsOf(item).map(card => card[2][place]).filter(score => score !== null && score !== undefined);
      return known.length ? sign * known.reduce((sum, score) => sum + score, 0) / known.length : Infinity;
    };
    const keys = new Map(shown.map(item => [item, value(item)]));
    shown.sort((one, other) => keys.get(one) - keys.get(other) || 0);
  }
  at("items").textContent = "";
  at("count").textContent = `${shown.length} of ${data.items.length} prompts`;
  drawn = 0;
  current = -1;
  drawMore();
}

function go(step) {
  const next = Math.max(0, Math.min(shown.length - 1, current + step));
  while (drawn <= next && drawn < shown.length) drawMore();
  const boxes = at("items").children;
  boxes[current]?.classList.remove("at");
  current = next;
  boxes[current]?.classList.add("at");
  boxes[current]?.scrollIntoView({ block: "start" });
}

// A link to one prompt shows it alone: "#ID" in the search. Esc shows all again.
function followLink() {
  const item = data.items.find(one => "#p-" + one.id === location.hash);
  if (!item) return;
  at("search").value = "#" + item.id;
  at("run").value = "any";
  at("rule").value = "all";
  update();
  go(1);
}

function option(select, value, text) {
  add(select, "option", text).value = value;
}

option(at("run"), "any", "any run");
data.runs.forEach((name, index) => index !== data.golden && option(at("run"), index, name));
option(at("rule"), "all", "all texts");
option(at("rule"), "cut", "did not stop");
data.labels.forEach(([label, kind], index) => kind === "fault" && option(at("rule"), "label:" + index, label));
data.metrics.forEach((name, index) => {
  const worst = data.lower.includes(name) ? 1 : 0;
  const some = data.items.some(item => item.cards.some(card => card[0] !== data.golden && card[2][index] === worst));
  if (some) option(at("rule"), "metric:" + index, `${name} = ${worst}`);
});
option(at("order"), "file", "order of the file");
data.metrics.forEach((name, index) => {
  option(at("order"), index + ":1", name + " ↑");
  option(at("order"), index + ":-1", name + " ↓");
});
at("wide")?.addEventListener("change", () => document.body.classList.toggle("narrow", !at("wide").checked));
for (const id of ["search", "run", "rule", "order"]) at(id).addEventListener("input", update);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") {
    at("search").value = "";
    at("search").blur();
    update();
  } else if (!/^(INPUT|SELECT)$/.test(event.target.tagName) && !event.ctrlKey && !event.metaKey && !event.altKey) {
    if (event.key === "j") go(1);
    if (event.key === "k") go(-1);
    if (event.key === "/") { event.preventDefault(); at("search").focus(); }
  }
});
new IntersectionObserver(entries => entries.some(entry => entry.isIntersecting) && drawMore(), { rootMargin: "800px" })
  .observe(at("end"));
addEventListener("hashchange", followLink);
update();
followLink();
