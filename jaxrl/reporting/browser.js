"use strict";
// The rollout browser (browser.py makes its data). First what needs no page, which the tests run; the page at the end.

const CORRECT = 1, CUT = 2, DROPPED = 4, UNGRADED = 8;
const PAGE = 6, ANSWERS = 6;  // groups on the screen, and answers of each before "more"
const START = { run: "0", step: "", problem: "", outcome: "", fate: "", least: "", most: "", order: "", colour: "logp" };

// ---- data

async function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const OUTCOMES = {
  "": () => true,
  correct: (bits) => (bits & (CORRECT | UNGRADED)) === CORRECT,
  wrong: (bits) => !(bits & (CORRECT | UNGRADED)),
  cut: (bits) => bits & CUT,
  ungraded: (bits) => bits & UNGRADED,
};
const FATES = { "": () => true, kept: (bits) => !(bits & DROPPED), dropped: (bits) => bits & DROPPED };

// [{group: its number in the index, step, place: its number in its step, rows: the answers that pass}].
function select(index, state) {
  const wanted = state.problem.trim().toLowerCase();
  const exact = index.problems.some(([id]) => id.toLowerCase() === wanted);
  const fits = index.problems.map(([id, head]) =>
    !wanted || (exact ? id.toLowerCase() === wanted : `${id} ${head}`.toLowerCase().includes(wanted)));
  const least = Number(state.least) || 0, most = Number(state.most) || Infinity;
  const outcome = OUTCOMES[state.outcome], fate = FATES[state.fate];
  const found = [], places = new Map();
  index.groups.forEach(([step, problem, lengths, digits], group) => {
    const place = places.get(step) || 0;
    places.set(step, place + 1);
    if (!fits[problem] || (state.step !== "" && index.steps[step] !== Number(state.step))) return;
    const rows = [];
    for (let i = 0; i < lengths.length; i++) {
      const bits = parseInt(digits[i], 16);
      if (lengths[i] >= least && lengths[i] <= most && outcome(bits) && fate(bits)) rows.push(i);
    }
    if (rows.length) found.push({ group, step, place, rows });
  });
  return found;
}

const ORDERS = {
  "": () => 0,
  shortest: (a, b) => a.length - b.length,
  longest: (a, b) => b.length - a.length,
  advantage: (a, b) => (b.advantage ?? -Infinity) - (a.advantage ?? -Infinity) || 0,
};

// ---- HTML: every value that is put into html`...` is escaped, unless html`...` made it

class Html { constructor(text) { this.text = text; } }
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (value) => String(value).replace(/[&<>"']/g, (c) => ESCAPES[c]);
const plain = (value) => value instanceof Html ? value.text : Array.isArray(value) ? value.map(plain).join("")
  : value === null || value === undefined || value === false ? "" : escaped(value);
const html = (parts, ...values) => new Html(parts.reduce((text, part, i) => text + plain(values[i - 1]) + part));

const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);
const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

// Ages in steps of the parameters that drew each token, from runs [age, count].
const agesOf = (answer) => (answer.old || []).flatMap(([age, n]) => Array(n).fill(age));

// [variable of the colour, strength in percent] of a token.
const COLOURS = {
  logp: (token) => ["hot", token.logp === null ? 0 : 70 * Math.min(Math.max(-token.logp, 0), 400) / 400],
  advantage: ({ advantage }) => [advantage > 0 ? "good" : "bad", 60 * Math.min(Math.abs(advantage || 0), 2) / 2],
  version: ({ age }) => ["c3", age > 0 ? 20 + 15 * Math.min(age, 3) : 0],
  none: () => ["hot", 0],
};

function title(token) {
  const said = [];
  if (token.logp !== null) said.push(`p ${Math.exp(Math.min(token.logp, 0) / 100).toPrecision(3)}`);
  if (token.advantage !== null) said.push(`advantage ${signed(token.advantage)}`);
  if (token.age > 0) said.push(`drawn by parameters ${counted(token.age, "step")} older`);
  return said.join(", ");
}

function text(answer, colour) {
  const ages = agesOf(answer);
  return answer.text.map((shown, i) => {
    const advantage = answer.advantages ? answer.advantages[i] : answer.advantage;
    const token = { logp: answer.logp[i] ?? null, advantage: advantage ?? null, age: ages[i] || 0 };
    const [name, strength] = COLOURS[colour](token);
    const style = strength < 1 ? "" : html` style="--h:var(--${name});--s:${Math.round(strength)}"`;
    return html`<span${style} title="${title(token)}">${shown}</span>`;
  });
}

function card(answer, colour) {
  const right = answer.outcome === "correct";
  const rewards = Object.entries(answer.rewards).map(([name, value]) => `${name} ${value ?? "not finite"}`);
  const facts = [
    html`<b class="mark ${right ? "right" : "wrong"}">${answer.outcome}</b>`,
    html`<b>${counted(answer.length, "token")}</b>`,
    answer.cut && html`<span class="mark wrong">cut at the limit</span>`,
    answer.advantage !== null && html`<span>advantage <b>${signed(answer.advantage)}</b></span>`,
    answer.reward !== null && html`<span>reward <b>${answer.reward}</b>${rewards.length > 1 && ` (${rewards.join(", ")})`}</span>`,
    answer.dropped !== null && html`<span>dropped${answer.dropped && `: ${answer.dropped.replaceAll("_", " ")}`}</span>`,
  ].filter(Boolean);
  const edge = COLOURS.advantage({ advantage: answer.advantage });
  return html`<article class=answer style="--h:var(--${edge[0]});--s:${Math.round(edge[1] * 100 / 60)}">
<div class=meta>${facts}</div><div class=text tabindex=0>${text(answer, colour)}</div></article>`;
}

// A prompt and its answers. found: of `select`; blob: of its step; all: whether to show every answer.
function group(index, found, blob, state, all) {
  const [step, problem, lengths, digits] = index.groups[found.group], [id] = index.problems[problem];
  const { prompt, answer, budget, answers } = blob[found.place];
  const chosen = found.rows.map((i) => answers[i]).sort(ORDERS[state.order]);
  const shown = all ? chosen : chosen.slice(0, ANSWERS);
  const bits = [...digits].map((digit) => parseInt(digit, 16)), n = lengths.length;
  const dropped = bits.filter(FATES.dropped).length;
  const facts = [
    dropped === n ? "dropped" : dropped ? `kept, ${dropped} of ${n} answers dropped` : "kept",
    `${bits.filter(OUTCOMES.correct).length} of ${n} correct`,
    `mean ${(lengths.reduce((a, b) => a + b, 0) / n).toFixed(1)} tokens`,
    answer && `answer ${answer}`,
    budget && `budget ${budget} tokens`,
    shown.length < n && `${shown.length} shown`,
  ].filter(Boolean).map((fact) => html`<span>${fact}</span>`);
  const more = shown.length < chosen.length && html`<button data-all="${found.group}">${chosen.length - shown.length} more</button>`;
  return html`<section class=group><div class=meta><button data-step="${index.steps[step]}" title="all of this step">step
${index.steps[step]}</button><button data-problem="${id}" title="this problem at every step">${id}</button>${facts}</div>
<p class=prompt tabindex=0>${prompt}</p><div class=answers>${shown.map((a) => card(a, state.colour))}</div>${more}</section>`;
}

const LEGENDS = {
  logp: html`Tokens that the policy found unlikely are shaded: <i class=scale style="--h:var(--hot)"></i> from probability 1 to e<sup>−4</sup>.`,
  advantage: html`<i class=scale style="--h:var(--good)"></i> encouraged by the update, <i class=scale style="--h:var(--bad)"></i> discouraged; full at 2.`,
  version: html`<i class=scale style="--h:var(--c3)"></i> drawn by parameters one, two, three or more steps older than the step's own.`,
  none: html`The bar of an answer is its advantage.`,
};

// ---- the page

const choice = (name, label, options, chosen) => html`<label>${label}<select name="${name}">${options.map(
  ([value, shown]) => html`<option value="${value}"${String(value) === chosen && html` selected`}>${shown}</option>`)}</select></label>`;

function controls(indices, state) {
  const index = indices[state.run];
  const number = (name, hint) => html`<input name="${name}" type=number min=0 inputmode=numeric placeholder="${hint}"
 value="${state[name]}" aria-label="${hint} tokens">`;
  const runs = indices.map(({ label }, i) => [i, label]);
  const any = index.groups.some(([, , , digits]) => /[89a-f]/.test(digits));
  return html`
${runs.length > 1 && choice("run", "Run", runs, state.run)}
<label class=steps>Step<span><button data-by=-1 aria-label="step before">‹</button><select name=step><option value="">all</option>${index.steps.map(
    (step) => html`<option${String(step) === state.step && html` selected`}>${step}</option>`)}</select><button data-by=1 aria-label="next step">›</button></span></label>
<label class=problem>Problem<input name=problem type=search placeholder="id, or how the prompt begins" value="${state.problem}"></label>
${choice("outcome", "Outcome", [["", "all"], ["correct", "correct"], ["wrong", "wrong"], ["cut", "cut at the limit"],
    ...(any ? [["ungraded", "not graded"]] : [])], state.outcome)}
${choice("fate", "Selection", [["", "all"], ["kept", "kept"], ["dropped", "dropped"]], state.fate)}
<label class=tokens>Tokens<span>${number("least", "from")}${number("most", "to")}</span></label>
${choice("order", "Order", [["", "as sampled"], ["shortest", "shortest first"], ["longest", "longest first"], ["advantage", "by advantage"]], state.order)}
${choice("colour", "Colour", [["logp", "log-prob"], ["advantage", "advantage"], ["version", "version"], ["none", "none"]], state.colour)}`;
}

async function open(root) {
  const stored = (id) => document.getElementById(id).textContent;
  const indices = [], blobs = new Map();
  while (document.getElementById(`r${indices.length}`)) indices.push(await decode(stored(`r${indices.length}`)));
  const blob = async (run, step) => {  // the newest few are kept decoded
    const key = `r${run}-${step}`, known = blobs.get(key) || decode(stored(key));
    blobs.delete(key);
    blobs.set(key, known);
    if (blobs.size > 2 * PAGE) blobs.delete(blobs.keys().next().value);
    return known;
  };
  const given = new URLSearchParams(location.hash.slice(1));
  const state = Object.fromEntries(Object.entries(START).map(([key, value]) => [key, given.get(key) ?? value]));
  if (!indices[state.run]) state.run = "0";
  for (const [key, table] of [["outcome", OUTCOMES], ["fate", FATES], ["order", ORDERS], ["colour", COLOURS]])
    if (!(state[key] in table)) state[key] = START[key];
  const last = () => String(indices[state.run].steps.at(-1) ?? "");
  if (!given.has("step") && !state.problem) state.step = last();
  let first = 0, drawing = 0;
  const whole = new Set();  // groups that show every answer

  root.innerHTML = "<form></form><p class=found aria-live=polite></p><div class=groups></div><div class=pages></div>";
  const [form, said, list, pages] = root.children;
  const fill = () => { form.innerHTML = controls(indices, state).text; };

  async function draw() {
    const mine = ++drawing, index = indices[state.run], found = select(index, state);
    first = Math.min(first, Math.max(0, PAGE * Math.floor((found.length - 1) / PAGE)));
    const page = found.slice(first, first + PAGE);
    const data = await Promise.all(page.map(({ step }) => blob(state.run, step)));
    if (mine !== drawing) return;  // another choice was made meanwhile
    const answers = found.reduce((n, { rows }) => n + rows.length, 0);
    const missing = index.stored - index.steps.length;
    said.innerHTML = html`${counted(answers, "answer")} to ${counted(found.length, "prompt")}. ${LEGENDS[state.colour]} ${missing > 0 &&
      `${index.steps.length} of the ${index.stored} sampled steps fit into this page (--max_mb).`}`.text;
    list.innerHTML = html`${page.map((f, i) => group(index, f, data[i], state, whole.has(f.group)))}`.text;
    pages.innerHTML = found.length <= PAGE ? "" : html`<button data-page=-1 ${first === 0 && "disabled"}>‹ before</button>
<span>${first + 1} – ${first + page.length} of ${found.length}</span><button data-page=1 ${first + PAGE >= found.length && "disabled"}>next ›</button>`.text;
    const kept = Object.entries(state).filter(([key, value]) => value !== START[key]);
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  }
  const change = (key, value) => {
    if (state[key] === value) return;
    state[key] = value;
    first = 0;
    whole.clear();
    if (key === "run") { state.step = state.problem ? "" : last(); fill(); }
    return draw();
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", ({ target }) => change(target.name, target.value));
  root.addEventListener("click", ({ target }) => {
    const { by, step, problem, all, page } = target.closest("button")?.dataset ?? {};
    if (by) {
      const { steps } = indices[state.run], at = steps.indexOf(Number(state.step));
      const to = state.step === "" ? (by > 0 ? 0 : steps.length - 1) : Math.min(Math.max(at + Number(by), 0), steps.length - 1);
      change("step", String(steps[to]));
    } else if (step !== undefined) { state.problem = ""; change("step", step) ?? draw();
    } else if (problem !== undefined) { state.step = ""; change("problem", problem) ?? draw();
    } else if (all !== undefined) { whole.add(Number(all)); draw(); return;
    } else if (page) { first += PAGE * Number(page); draw().then(() => root.scrollIntoView()); return;
    } else return;
    fill();
  });
  fill();
  await draw();
}

if (typeof document !== "undefined") {
  const root = document.getElementById("rollouts");
  open(root).catch((error) => { root.textContent = `The completions cannot be shown by this browser: ${error.message}`; });
}
if (typeof module !== "undefined") module.exports = { START, decode, select, group, controls };
