"use strict";

/* Finding: pure functions of the page's data, without a document. */

const PAGE = 40; // features drawn at a time
const METRICS = {
  density: "density", peak: "peak activation", mean: "mean activation", i: "number",
  precision: "explanation precision", recall: "explanation recall", splits: "children in the wider one",
};
const RISING = new Set(["i"]);
const CLEAR = 0.3; // a token belongs to what a latent is about from this part of its peak on

function activations(feature, index, length) {
  const values = new Array(length).fill(0);
  const marks = feature.examples[index][1];
  for (let at = 0; at < marks.length; at += 2) values[marks[at]] = marks[at + 1] / 99;
  return values;
}

/* The text that a search looks through: clearly active tokens with the one before, and promoted tokens. */
function searchable(data, feature) {
  const parts = [];
  feature.examples.forEach(([context, marks]) => {
    const tokens = data.contexts[context];
    for (let at = 0; at < marks.length; at += 2) {
      if (marks[at + 1] < 99 * CLEAR) continue;
      const place = marks[at];
      parts.push((place > 0 ? data.words[tokens[place - 1]] : "") + data.words[tokens[place]]);
    }
  });
  for (const [token] of feature.up || []) parts.push(data.words[token]);
  return parts.join("\n").toLowerCase();
}

function found(data, texts, query, metric) {
  const wanted = query.trim().toLowerCase();
  const number = /^#(\d+)$/.exec(wanted);
  const chosen = data.features.filter((feature, at) =>
    number ? feature.i === Number(number[1]) : !wanted || texts[at].includes(wanted));
  const missing = -Infinity; // sorts behind everything, whichever way
  const value = (feature) => feature[metric] ?? missing;
  const sign = RISING.has(metric) ? 1 : -1;
  return chosen.sort((a, b) => {
    const left = value(a), right = value(b);
    if (left === right) return a.i - b.i;
    if (left === missing || right === missing) return left === missing ? 1 : -1;
    return sign * (left - right);
  });
}

function readAddress(hash) {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const latent = said.get("latent");
  const sort = said.get("sort");
  return { q: latent === null ? said.get("q") || "" : "#" + latent, sort: sort in METRICS ? sort : "peak" };
}

/* Drawing: text goes into the document as text, never as markup. */

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/* Heights on a logarithmic scale, over an axis from 0 to the peak. */
function histogram(heights, peak) {
  const axis = element("figcaption", {}, ...["0", "activation", digits(peak)].map((text) => element("span", {}, text)));
  return element("figure", {}, bars(heights), axis);
}

function bars(heights) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", `0 0 ${heights.length} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "tokens by activation, from 0 to the peak, on a logarithmic scale");
  const most = Math.log1p(Math.max(1, ...heights));
  heights.forEach((height, at) => {
    const bar = document.createElementNS(space, "rect");
    const size = Math.log1p(height) / most;
    for (const [name, value] of Object.entries({ x: at, y: 1 - size, width: 0.9, height: size })) {
      bar.setAttribute(name, value);
    }
    svg.append(bar);
  });
  return svg;
}

/* White space that a reader sees; long runs of spaces would overflow a narrow page. */
function shown(word) {
  return word.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/ {4,}/g, (run) => `␣×${run.length} `);
}

/* Two significant digits: what a reader compares. */
function digits(value) {
  return String(Number(value.toPrecision(2)));
}

function example(data, feature, index) {
  const tokens = data.contexts[feature.examples[index][0]];
  const values = activations(feature, index, tokens.length);
  return element("p", { class: "example" }, ...tokens.map((token, at) => {
    const word = shown(data.words[token]);
    if (!values[at]) return word;
    const title = digits(values[at] * feature.peak);
    return element("span", { title, style: `background: rgb(var(--hot) / ${values[at].toFixed(2)})` }, word);
  }));
}

function effects(data, name, list) {
  const words = list.map(([token, value]) => `${shown(data.words[token])} ${digits(value)}`).join("   ");
  return element("p", { class: "tokens" }, element("span", { class: "soft" }, name + "  "), words);
}

/* A pattern ends in the active token; where an encoder needs tokens after it, it stands in brackets. */
function pattern_text(data, [before, after]) {
  const words = before.map((token) => (token === null ? "∗" : shown(data.words[token])));
  if (!after.length) return words.join("");
  const active = words.pop();
  const rest = after.map((token) => (token === null ? "∗" : shown(data.words[token])));
  return words.join("") + "⟦" + active + "⟧" + rest.join("");
}

function article(data, feature) {
  const facts = ["density", "peak", "mean"].map((name) => `${name} ${digits(feature[name])}`);
  if (feature.precision !== undefined) {
    const [precision, recall] = [feature.precision, feature.recall].map((part) => (part == null ? "none" : digits(part)));
    facts.push(`N2G precision ${precision}, recall ${recall}`);
  }
  const head = element("header", {},
    element("h2", {}, element("a", { href: `#latent=${feature.i}` }, `latent ${feature.i}`)),
    ...facts.map((fact) => element("span", { class: "soft" }, fact)));
  const side = element("div", {}, histogram(feature.bars, feature.peak));
  if (feature.up) side.append(effects(data, "promotes", feature.up), effects(data, "suppresses", feature.down));
  if (feature.patterns) {
    const spelt = feature.patterns.map((pattern) => pattern_text(data, pattern));
    side.append(element("p", { class: "tokens" }, element("span", { class: "soft" }, "patterns  "), spelt.join("   ")));
  }
  for (const [child, cosine, tokens] of feature.children || []) {
    const words = tokens.map((token) => shown(data.words[token])).join(" ");
    const name = element("span", { class: "soft" }, `wider ${child}  `);
    side.append(element("p", { class: "tokens" }, name, `${digits(cosine)}  ${words}`));
  }
  const near = element("p", { class: "tokens" }, element("span", { class: "soft" }, "active with latents (overlap)  "));
  for (const [other, likeness] of feature.near) {
    near.append(element("a", { href: `#latent=${other}` }, `${other}`), ` ${digits(likeness)}   `);
  }
  if (feature.near.length) side.append(near);
  const texts = element("div", {}, ...feature.examples.map((_, index) => example(data, feature, index)));
  return element("article", { "data-latent": feature.i }, head, element("div", { class: "columns" }, texts, side));
}

function start() {
  const began = performance.now();
  const data = JSON.parse(document.getElementById("data").textContent);
  const texts = data.features.map((feature) => searchable(data, feature));
  const form = document.querySelector("form");
  const list = document.getElementById("features");
  const more = document.getElementById("more");
  let current = [], drawn = 0;
  for (const [name, label] of Object.entries(METRICS)) {
    if (data.features.some((feature) => name in feature)) {
      form.sort.append(element("option", { value: name }, label));
    }
  }
  function draw() {
    list.append(...current.slice(drawn, drawn + PAGE).map((feature) => article(data, feature)));
    drawn = Math.min(drawn + PAGE, current.length);
    more.hidden = drawn === current.length;
  }
  function show() {
    const before = performance.now();
    current = found(data, texts, form.q.value, form.sort.value);
    form.count.value = `${current.length} of ${data.features.length} latents`;
    list.replaceChildren();
    drawn = 0;
    draw();
    document.documentElement.dataset.search = (performance.now() - before).toFixed(1);
  }
  function follow() {
    const said = readAddress(location.hash);
    form.q.value = said.q;
    form.sort.value = said.sort;
    show();
  }
  function changed() {
    const said = new URLSearchParams();
    if (form.q.value) said.set("q", form.q.value);
    said.set("sort", form.sort.value);
    try {
      history.replaceState(null, "", "#" + said);
    } catch {
      // A page inside another may have no address of its own.
    }
    show();
  }
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", draw);
  new IntersectionObserver((seen) => { if (seen.some((s) => s.isIntersecting)) draw(); }, { rootMargin: "600px" })
    .observe(more);
  window.addEventListener("hashchange", follow);
  follow();
  document.documentElement.dataset.ready = (performance.now() - began).toFixed(1);
}

if (typeof document !== "undefined") start();
