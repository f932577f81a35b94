// Loss against learning rate: choose tables and sizes, let the training go on, drag an LR, read what it costs each model.
//
// One module, two homes: a notebook loads it as an anywidget; a page inlines it, with `plainModel` in the kernel's place. The
// arithmetic repeats transfer.py, function by function; tests/test_page.py compares the two on every shipped sweep.
//
// data: see `explorer_data` in lr_explorer.py. Tables, values (sizes), seeds and steps are places in its lists. A point of a
// curve is { x, loss, spread, seeds }, x the log2 of the LR; a curve is a list of points, x ascending.

// --- arithmetic ---------------------------------------------------------------------------------------------------

const NEAR = 1e-9;
const sum = values => values.reduce((a, b) => a + b, 0);
const mean = values => sum(values) / values.length;
const spread = values => Math.sqrt(sum(values.map(v => (v - mean(values)) ** 2)) / (values.length - 1)); // NaN of one value
const stderr = values => spread(values) / Math.sqrt(values.length);

// { x: [{ seed, loss }] } of one table and size after a step, x ascending
function runsAt(data, table, value, step, seeds) {
  const at = new Map();
  for (const [t, v, seed, x, losses] of data.runs) {
    if (t !== table || v !== value || !seeds.includes(seed)) continue;
    const loss = losses[step] === null ? Infinity : losses[step] / 1e6;
    if (!at.has(x)) at.set(x, []);
    at.get(x).push({ seed, loss });
  }
  return new Map([...at].sort(([a], [b]) => a - b));
}

// The mean over the seeds and its spread, one standard deviation
export function curve(data, table, value, step, seeds) {
  return [...runsAt(data, table, value, step, seeds)].map(([x, runs]) => {
    const losses = runs.map(run => run.loss);
    return { x, loss: mean(losses), spread: spread(losses) || 0, seeds: losses.length };
  });
}

// { x, loss, edge }: the minimum by a parabola through the best point and its neighbours; where that is impossible, the best
// point itself, on the edge. null if every run diverged.
export function optimum(curve) {
  if (!curve.some(p => isFinite(p.loss))) return null;
  const i = curve.reduce((best, p, place) => (p.loss < curve[best].loss ? place : best), 0);
  const [a, b, c] = [curve[i - 1], curve[i], curve[i + 1]];
  if (!a || !c || !isFinite(a.loss) || !isFinite(c.loss)) return { x: b.x, loss: b.loss, edge: true };
  const [left, right, fall, rise] = [b.x - a.x, c.x - b.x, a.loss - b.loss, c.loss - b.loss];
  const move = fall || rise ? (fall * right ** 2 - rise * left ** 2) / (2 * (fall * right + rise * left)) : 0;
  return { x: b.x + move, loss: b.loss, edge: false };
}

// The loss at x, on a line between the grid's points; NaN outside the grid
export function lossAt(curve, x) {
  if (!curve.length || x < curve[0].x - NEAR || x > curve.at(-1).x + NEAR) return NaN;
  const j = curve.findIndex(p => p.x >= x - NEAR);
  const b = curve[j], a = curve[j - 1];
  return Math.abs(b.x - x) <= NEAR ? b.loss : a.loss + ((b.loss - a.loss) * (x - a.x)) / (b.x - a.x);
}

export function regret(curve, x) {
  const best = optimum(curve);
  return best ? lossAt(curve, x) - best.loss : NaN;
}

// Slope of y over x, and the coefficient of x^2, by least squares; x^2 made orthogonal to 1 and x
const centred = values => { const m = mean(values); return values.map(v => v - m); };
const dot = (a, b) => sum(a.map((v, i) => v * b[i]));
const slope = (x, y) => { const u = centred(x); return dot(u, y) / dot(u, u); };
function curvature(x, y) {
  const u = centred(x), squares = centred(u.map(v => v * v)), along = dot(squares, u) / dot(u, u);
  const q = squares.map((v, i) => v - along * u[i]);
  return dot(q, y) / dot(q, q);
}

// { seed: log2 of its best LR, or NaN }: parabolas of the mean curve's curvature, within an octave of its best grid LR
export function seedOptima(data, table, value, step, seeds) {
  const at = [...runsAt(data, table, value, step, seeds)];
  const present = [...new Set(at.flatMap(([, runs]) => runs.map(run => run.seed)))];
  const whole = at.filter(([, runs]) => runs.length === present.length);
  const nowhere = new Map(present.map(seed => [seed, NaN]));
  const means = whole.map(([x, runs]) => ({ x, loss: mean(runs.map(run => run.loss)) }));
  const best = optimum(means);
  if (!best || best.edge) return nowhere;
  const centre = means.reduce((a, b) => (b.loss < a.loss ? b : a)).x;
  const near = whole.filter(([x]) => Math.abs(x - centre) <= 1 + NEAR);
  const xs = near.map(([x]) => x - centre), losses = near.map(([, runs]) => runs);
  if (xs.length < 3 || losses.flat().some(run => !isFinite(run.loss))) return nowhere;
  const bend = curvature(xs, losses.map(runs => mean(runs.map(run => run.loss))));
  if (bend <= 0) return nowhere;
  return new Map(present.map(seed => {
    const y = losses.map((runs, i) => runs.find(run => run.seed === seed).loss - bend * xs[i] ** 2);
    const place = -slope(xs, y) / (2 * bend);
    return [seed, Math.abs(place) <= 1 ? place + centre : NaN];
  }));
}

// { value, error } of one size's best LR over the seeds that have one
export function bestOctave(data, table, value, step, seeds) {
  const found = [...seedOptima(data, table, value, step, seeds).values()].filter(x => !isNaN(x));
  return { value: found.length ? mean(found) : NaN, error: stderr(found) };
}

// { value, error }: by how many octaves the best LR moves from the first of the sizes to the last, over the seeds that have an
// optimum at every size; `alone`: by the mean curves, where there is one seed
export function drift(data, table, values, step, seeds) {
  const own = values.map(value => seedOptima(data, table, value, step, seeds));
  const whole = [...own[0].keys()].filter(seed => own.every(found => !isNaN(found.get(seed) ?? NaN)));
  const moves = whole.map(seed => own.at(-1).get(seed) - own[0].get(seed));
  return { value: moves.length ? mean(moves) : NaN, error: stderr(moves) };
}

export function driftWords({ value, error }) {
  if (isNaN(value)) return "no optimum to compare";
  if (isNaN(error)) return `drift ${signed(value)} octaves (one seed)`;
  const seen = Math.abs(value) > 2 * error;
  return seen ? `drift ${signed(value)} ± ${error.toFixed(2)} octaves` : `no drift seen (below ${(Math.abs(value) + 2 * error).toFixed(2)})`;
}

const signed = x => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`;
const octave = x => (Math.round(x * 100) / 100).toString().replace("-", "−");

// --- a model without a kernel ----------------------------------------------------------------------------------------

export function plainModel(state) {
  const listeners = [];
  return {
    get: name => state[name],
    set(name, value) { state[name] = value; listeners.filter(([n]) => n === `change:${name}`).forEach(([, call]) => call()); },
    on: (name, call) => listeners.push([name, call]),
    off: (name, call) => listeners.splice(0, listeners.length, ...listeners.filter(([n, c]) => n !== name || (call && c !== call))),
    save_changes() {},
  };
}

// --- elements --------------------------------------------------------------------------------------------------------

// A tag with attributes and children; text is never read as HTML
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name in made && name !== "list" ? (made[name] = value) : made.setAttribute(name, value);
  made.append(...children);
  return made;
}
function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const MARKS = { // matplotlib's letters, as paths about (0, 0)
  o: "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z", s: "M-4-4h8v8h-8z", D: "M0-5.5L5.5 0L0 5.5L-5.5 0z", "^": "M0-5.5L5 4.5H-5z",
  v: "M0 5.5L5-4.5H-5z", P: "M-1.8-5h3.6v3.2h3.2v3.6h-3.2v3.2h-3.6v-3.2h-3.2v-3.6h3.2z", X: "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0z",
  "<": "M-5.5 0L4.5-5V5z", ">": "M5.5 0L-4.5-5V5z", h: "M-4.5-2.6L0-5.2L4.5-2.6V2.6L0 5.2L-4.5 2.6z",
};
const STAR = Array.from({ length: 10 }, (_, i) => [i % 2 ? 4 : 10, (Math.PI * i) / 5])
  .map(([r, a], i) => `${i ? "L" : "M"}${(r * Math.sin(a)).toFixed(2)} ${(-r * Math.cos(a)).toFixed(2)}`).join("") + "z";
const path = dots => dots.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
const placed = (d, x, y, more) => shape("path", { d, transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, ...more });

// --- the explorer ------------------------------------------------------------------------------------------------------

class Explorer {
  constructor(model, el) {
    Object.assign(this, { model, el, guesses: null, predicting: false, timer: null });
    el.classList.add("minimoe-lr");
    el.addEventListener("keydown", event => event.stopPropagation()); // arrow keys are the sliders', and not the notebook's
    this.build();
    this.reacts = ["tables", "values", "seeds", "swapped", "minima", "step", "my_lr", "live", "note"].map(name => [`change:${name}`, () => this.synced(name)]);
    this.reacts.forEach(([name, call]) => model.on(name, call));
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.panels);
    this.draw();
  }

  get data() { return this.model.get("datasets")[this.model.get("dataset")]; }
  // what is chosen, as places in the lists of `data`
  chosen(name) { const all = this.data[name], own = this.model.get(name); return all.map((_, i) => i).filter(i => own.includes(all[i])); }
  get step() { return this.data.steps.indexOf(this.model.get("step")); }
  get x() { return this.model.get("my_lr"); }
  get low() { return Math.min(...this.data.runs.map(run => run[3])); }
  get high() { return Math.max(...this.data.runs.map(run => run[3]), ...this.model.get("live").map(run => run[2])); }
  curve(table, value) { return curve(this.data, table, value, this.step, this.chosen("seeds")); }

  remove() {
    this.reacts.forEach(([name, call]) => this.model.off(name, call));
    this.resized.disconnect();
    clearInterval(this.timer);
  }

  // --- controls

  build() {
    const { data } = this, names = Object.keys(this.model.get("datasets"));
    const choice = element("select", { onchange: () => this.change(choice.value) }, ...names.map(name => element("option", { value: name }, name)));
    choice.value = this.model.get("dataset");
    this.stepSlider = element("input", { type: "range", min: 0, max: data.steps.length - 1, step: 1, oninput: () => this.goTo(+this.stepSlider.value), onchange: () => this.save() });
    this.lrSlider = element("input", { type: "range", min: this.low, max: this.high, step: 0.25, oninput: () => this.move(+this.lrSlider.value), onchange: () => this.save() });
    this.stepWords = element("output"); this.lrWords = element("output");
    this.play = element("button", { type: "button", onclick: () => this.train() }, "▶ Train");
    this.predict = element("button", { type: "button", onclick: () => this.predictOrReveal() }, "Predict first");
    const minima = this.tick("mark the minima", this.model.get("minima"), on => this.put("minima", on));
    const swapped = this.tick(`a panel for each ${data.label}`, this.model.get("swapped"), on => this.put("swapped", on));
    this.panels = element("div", { className: "panels" });
    this.side = element("div", { className: "side" });
    this.words = element("p", { role: "status", className: "status" });
    this.el.replaceChildren(
      element("div", { className: "controls" },
        ...(names.length > 1 ? [element("label", {}, "grow the", choice)] : []),
        this.choices("tables", data.names), this.choices("values", data.plural), this.choices("seeds", "seeds")),
      element("div", { className: "controls" },
        element("label", {}, "after step", this.stepSlider), this.stepWords, this.play,
        element("label", {}, "my LR", this.lrSlider), this.lrWords, this.predict, minima, swapped),
      element("div", { className: "figure" }, this.panels, this.side), this.words);
    this.panels.onpointerdown = event => this.drag(event);
    this.panels.onpointermove = event => event.buttons && this.drag(event);
    this.panels.onpointerup = () => this.save();
  }

  tick(words, on, call) {
    const box = element("input", { type: "checkbox", checked: on, onchange: () => { call(box.checked); this.save(); } });
    return element("label", {}, box, words);
  }

  choices(name, legend) {
    const boxes = this.data[name].map(item => this.tick(String(item), this.model.get(name).includes(item), on => {
      const own = this.model.get(name);
      this.put(name, this.data[name].filter(other => (other === item ? on : own.includes(other))));
    }));
    return element("fieldset", {}, element("legend", {}, legend), element("div", { className: "choices" }, ...boxes));
  }

  put(name, value) { this.quiet = true; this.model.set(name, value); this.quiet = false; this.verdict = null; this.draw(); }
  save() { this.model.save_changes(); this.say(); }
  synced(name) { // the kernel changed the state
    if (this.quiet) return;
    if (!["step", "my_lr", "live", "note"].includes(name)) this.build(); // its boxes; a new box would lose the keyboard
    this.draw();
  }

  change(name) {
    const data = this.model.get("datasets")[name];
    this.quiet = true;
    for (const [trait, value] of Object.entries({ dataset: name, ...data.start })) this.model.set(trait, value);
    this.quiet = false;
    this.guesses = this.verdict = null; this.predicting = false;
    this.build(); this.draw(); this.save();
  }

  goTo(step) { this.put("step", this.data.steps[step]); }

  train() { // the curves shift as the training goes on; who asks for less motion moves one step for each press
    const last = this.data.steps.length - 1, stop = () => { clearInterval(this.timer); this.timer = null; this.play.textContent = "▶ Train"; this.save(); };
    if (this.timer) return stop();
    if (this.step === last) this.goTo(0);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return this.goTo(Math.min(this.step + 1, last));
    this.play.textContent = "❚❚ Pause";
    this.timer = setInterval(() => (this.step === last ? stop() : this.goTo(this.step + 1)), 450);
  }

  // --- my LR

  drag(event) {
    const panel = event.target.closest("svg");
    if (!panel) return;
    const box = panel.getBoundingClientRect(), { left, right, from, to } = this.frame;
    const x = from + ((event.clientX - box.left - left) / (box.width - left - right)) * (to - from);
    const at = Math.max(this.low, Math.min(this.high, Math.round(x * 4) / 4));
    if (this.predicting) this.guess(+panel.dataset.table, at);
    else this.move(at);
  }

  move(x) {
    this.quiet = true; this.model.set("my_lr", x); this.quiet = false;
    if (this.predicting) this.guesses.forEach((_, table) => this.guesses.set(table, x));
    this.mark();
  }

  guess(table, x) { this.guesses.set(table, x); this.mark(); }

  predictOrReveal() {
    if (this.predicting) {
      this.predicting = false;
      this.verdict = [...this.guesses].map(([table, x]) => this.judged(table, x));
      this.predict.textContent = "Predict first";
    } else {
      this.predicting = true; this.verdict = null;
      this.guesses = new Map(this.chosen("tables").map(table => [table, this.x]));
      this.predict.textContent = "Reveal";
    }
    this.draw(); this.say();
  }

  judged(table, x) { // one guess, in words
    const value = this.chosen("values").at(-1), own = this.curve(table, value), best = optimum(own);
    const name = `${this.data.tables[table]}: `;
    if (!best) return `${name}every run diverged`;
    const off = x - best.x, cost = regret(own, x), far = Math.abs(off).toFixed(2);
    const where = Math.abs(off) < 0.125 ? "right" : `${far} octaves too ${off > 0 ? "high" : "low"}`;
    return `${name}${where}${isNaN(cost) ? "" : `, costs ${cost.toFixed(3)} nats`}`;
  }

  // --- drawing

  draw() {
    const tables = this.chosen("tables"), values = this.chosen("values");
    this.stepSlider.value = this.step; this.lrSlider.value = this.x;
    this.stepWords.textContent = this.data.steps[this.step];
    const missing = [["tables", this.data.names], ["values", this.data.plural], ["seeds", "seeds"]].find(([name]) => !this.chosen(name).length);
    if (missing) {
      this.panels.replaceChildren(element("b", {}, `choose at least one of ${missing[1]}`));
      this.side.replaceChildren();
      return;
    }
    if (this.predicting) this.guesses = new Map(tables.map(table => [table, this.guesses.get(table) ?? this.x]));
    this.curves = new Map(tables.map(t => [t, new Map(values.map(v => [v, this.curve(t, v)]))]));
    this.optima = new Map(tables.map(t => [t, new Map(values.map(v => [v, optimum(this.curves.get(t).get(v))]))]));
    const swapped = this.model.get("swapped") && !this.predicting;
    this.measure(swapped ? values.length : tables.length);
    this.panels.replaceChildren(...(swapped ? values.map(v => this.panel(tables.map(t => [t, v]), true)) : tables.map(t => this.panel(values.map(v => [t, v]), false))));
    this.mark();
  }

  measure(number) { // the size of a panel, and how data become pixels
    const room = Math.max(260, this.panels.clientWidth || 900);
    const columns = Math.min(number, Math.max(1, Math.floor(room / 250)), 3);
    const width = Math.floor(room / columns) - 2, height = number > columns ? 270 : Math.max(300, Math.min(430, Math.round(width * 1.3)));
    const [best, top] = this.data.limits, pad = 0.05 * (top - best);
    const frame = { width, height, left: 56, right: 10, top: 44, bottom: 42, from: this.low - 0.25, to: this.high + 0.25 };
    frame.X = x => frame.left + ((x - frame.from) / (frame.to - frame.from)) * (width - frame.left - frame.right);
    frame.Y = y => frame.top + ((top + pad - Math.min(y, top)) / (top - best + 2 * pad)) * (height - frame.top - frame.bottom);
    this.frame = frame;
  }

  panel(pairs, swapped) {
    const { data, frame } = this, { width, height, left, right, top, bottom, X, Y } = frame;
    const [table, value] = pairs[0], seeds = this.chosen("seeds"), sizes = this.chosen("values");
    const title = swapped ? `${data.label} ${data.values[value]}` : data.tables[table];
    const moved = !swapped && sizes.length > 1 && !this.predicting ? driftWords(drift(data, table, sizes, this.step, seeds)) : "";
    const shown = this.predicting ? pairs.slice(0, 1) : pairs;
    const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "data-table": table, "data-value": value, "aria-label": this.described(title, moved, shown, swapped) });
    svg.append(text(left, 17, title, "title"), text(left, 35, moved, "drift"));
    this.axes(svg);
    for (const [t, v] of shown) this.line(svg, t, v, swapped ? data.looks.tables[t] : data.looks.values[v]);
    for (const run of this.live(shown)) svg.append(run);
    if (this.model.get("minima")) for (const [t, v] of shown) this.star(svg, t, v, swapped ? data.looks.tables[t] : data.looks.values[v]);
    svg.append(shape("line", { class: "mine", y1: top, y2: height - bottom, x1: 0, x2: 0 }));
    return svg;
  }

  axes(svg) {
    const { width, height, left, right, top, bottom, X, Y } = this.frame, [best, most] = this.data.limits;
    const unit = [0.05, 0.1, 0.2, 0.5, 1].find(u => (most - best) / u <= 7) ?? 2;
    for (let y = Math.ceil(best / unit) * unit; y <= most + NEAR; y += unit)
      svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: Y(y), y2: Y(y) }), text(left - 6, Y(y) + 4.5, y.toFixed(unit < 0.1 ? 2 : 1), "end"));
    const every = width < 300 ? 2 : 1;
    for (let x = Math.ceil(this.low); x <= this.high; x++) {
      svg.append(shape("line", { class: "grid", y1: top, y2: height - bottom, x1: X(x), x2: X(x) }));
      if (x % every === 0) svg.append(text(X(x), height - bottom + 17, "2", "middle", shape("tspan", { dy: -5, "font-size": 10 }, String(x).replace("-", "−"))));
    }
    svg.append(text((left + width - right) / 2, height - 6, "learning rate", "middle"));
    svg.append(text(13, (top + height - bottom) / 2, "validation loss (nats)", "middle upright"));
  }

  line(svg, table, value, look) {
    const { X, Y } = this.frame, [, top] = this.data.limits;
    const own = this.curves.get(table).get(value).filter(p => isFinite(p.loss));
    const at = own.map(p => [X(p.x), Y(p.loss)]);
    if (own.some(p => p.spread)) {
      const rim = sign => own.map(p => [X(p.x), Y(p.loss + sign * p.spread)]);
      svg.append(shape("path", { class: "band", d: path([...rim(1), ...rim(-1).reverse()]) + "z", fill: look.color }));
    }
    svg.append(shape("path", { class: "curve", d: path(at), stroke: look.color, "data-table": table, "data-value": value }));
    for (const [i, [x, y]] of at.entries()) svg.append(placed(own[i].loss > top ? MARKS.X : MARKS[look.marker], x, y, { fill: look.color }));
  }

  star(svg, table, value, look) {
    const best = this.optima.get(table).get(value), own = this.curves.get(table).get(value);
    if (!best) return;
    const { X, Y } = this.frame, { value: found, error } = bestOctave(this.data, table, value, this.step, this.chosen("seeds"));
    const x = X(best.x), y = Y(lossAt(own, best.x));
    if (!isNaN(error) && !best.edge) svg.append(shape("path", { class: "error", d: `M${X(found - error).toFixed(1)} ${y.toFixed(1)}H${X(found + error).toFixed(1)}`, stroke: look.color }));
    svg.append(placed(STAR, x, y, { class: "star", fill: best.edge ? "#ffffff" : look.color, stroke: "#000000", "data-table": table, "data-value": value, "data-x": best.x }));
  }

  live(pairs) { // rows that a live sweep has trained, drawn dashed and hollow
    const { data, frame: { X, Y } } = this, drawn = [];
    for (const [t, v] of pairs) {
      const own = this.model.get("live").filter(([table, value]) => table === data.tables[t] && value === data.values[v]).sort((a, b) => a[2] - b[2]);
      const at = own.filter(([, , , loss]) => loss !== null).map(([, , x, loss]) => [X(x), Y(loss)]), look = this.model.get("swapped") ? data.looks.tables[t] : data.looks.values[v];
      if (!at.length) continue;
      drawn.push(shape("path", { class: "curve live", d: path(at), stroke: look.color }));
      drawn.push(...at.map(([x, y]) => placed(MARKS[look.marker], x, y, { fill: "#ffffff", stroke: look.color })));
    }
    return drawn;
  }

  described(title, moved, pairs, swapped) { // the panel in words, for who cannot see it
    const { data } = this;
    const minima = pairs.map(([t, v]) => {
      const best = this.optima.get(t).get(v);
      return `${swapped ? data.tables[t] : `${data.label} ${data.values[v]}`}: ${best ? `lowest ${best.loss.toFixed(2)} at 2^${best.x.toFixed(1)}` : "all diverged"}`;
    });
    return `Loss against learning rate, ${title}${moved && `, ${moved}`}. ${minima.join("; ")}`;
  }

  mark() { // my LR: its line in every panel, and what it costs; no curve is drawn again
    for (const svg of this.panels.querySelectorAll("svg")) {
      const x = this.predicting ? this.guesses.get(+svg.dataset.table) : this.x, line = svg.querySelector(".mine");
      line.setAttribute("x1", this.frame.X(x)); line.setAttribute("x2", this.frame.X(x)); line.dataset.x = x;
    }
    this.lrSlider.value = this.x;
    this.lrWords.replaceChildren("2", element("sup", {}, octave(this.x)));
    this.lrSlider.setAttribute("aria-valuetext", `2 to the power of ${this.x}`);
    this.stepSlider.setAttribute("aria-valuetext", `step ${this.data.steps[this.step]}`);
    this.side.replaceChildren(...(this.predicting ? this.asked() : [this.legendAndRegrets(), element("p", {}, this.model.get("note")), ...this.judgement()]));
  }

  asked() {
    const { data } = this, values = this.chosen("values");
    const say = `You see ${data.label} ${data.values[values[0]]} alone. Drag the line of each panel to where you expect the best LR of ${data.label} ${data.values[values.at(-1)]}. Then press Reveal.`;
    return [element("p", {}, say)];
  }

  judgement() {
    if (!this.verdict) return [];
    const value = this.data.values[this.chosen("values").at(-1)];
    return [element("p", {}, element("b", {}, `Your guess for ${this.data.label} ${value}`)), element("ul", {}, ...this.verdict.map(words => element("li", {}, words)))];
  }

  legendAndRegrets() { // one table is both: a column for each look, a cell for each cost
    const { data } = this, values = this.chosen("values"), tables = this.chosen("tables"), swapped = this.model.get("swapped");
    const key = look => { const svg = shape("svg", { width: 14, height: 14, "aria-hidden": "true" }, placed(MARKS[look.marker], 7, 7, { fill: look.color })); return svg; };
    const head = values.map(v => element("th", { scope: "col" }, ...(swapped ? [] : [key(data.looks.values[v])]), String(data.values[v])));
    const rows = tables.map(t => element("tr", {},
      element("th", { scope: "row" }, ...(swapped ? [key(data.looks.tables[t])] : []), data.tables[t]),
      ...values.map(v => this.cost(t, v))));
    return element("table", {}, element("caption", {}, "what my LR costs (nats)"), element("tr", {}, element("th", { scope: "col" }, data.label), ...head), ...rows);
  }

  cost(table, value) {
    const own = this.curves.get(table).get(value), cost = regret(own, this.x), made = element("td", {});
    if (!own.length) made.textContent = "no runs";
    else if (!optimum(own)) made.textContent = "all diverged";
    else if (isNaN(cost)) made.textContent = "off the grid";
    else made.textContent = isFinite(cost) ? cost.toFixed(3) : "diverged";
    made.dataset.regret = cost;
    made.classList.add(cost > 0.1 ? "high" : cost > 0.02 ? "some" : "low");
    return made;
  }

  say() { // for a screen reader: after a drag has ended, not during it
    if (this.predicting) return (this.words.textContent = "predicting: only the smallest size is shown");
    const sizes = this.chosen("values"), seeds = this.chosen("seeds");
    if (sizes.length < 2 || !seeds.length) return (this.words.textContent = "");
    const moves = this.chosen("tables").map(t => `${this.data.tables[t]}: ${driftWords(drift(this.data, t, sizes, this.step, seeds))}`);
    const ends = `${this.data.label} ${this.data.values[sizes[0]]} to ${this.data.values[sizes.at(-1)]}`;
    this.words.textContent = `My LR is 2^${octave(this.x)}. From ${ends}: ${moves.join("; ")}.`;
  }
}

function text(x, y, words, kind, ...more) {
  const upright = kind.includes("upright") ? { transform: `rotate(-90 ${x} ${y})` } : {};
  return shape("text", { x, y, class: kind, ...upright }, words, ...more);
}

// anywidget's interface: draw into el; what is returned clears up
function render({ model, el }) {
  const explorer = new Explorer(model, el);
  explorer.say();
  return () => explorer.remove();
}

export default { render };
