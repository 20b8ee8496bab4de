// Shows /page.json and asks for it again while somebody looks. Text from the daemon only ever
// becomes text: there is no innerHTML, and the policy of the server allows no other script.
"use strict";

const EVERY_MS = 2000;
const SILENT_MS_MAX = 8000;
const COLUMN_PX_MIN = 12;
const COLUMN_PX_MAX = 18;
const TIERS = ["memory", "spool", "store", "mirror"];

let clockSkew = 0; // seconds that the host's clock is ahead of this one's
let seenAt = 0;
const chosen = new Map(); // job label -> step that a person has picked

const $ = (place, selector) => place.querySelector(selector);
const now = () => Date.now() / 1000 + clockSkew;

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function mark(element, name, value) {
  if (value === null || value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

// ---- words ------------------------------------------------------------------

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < units.length - 1; unit++) bytes /= 1024;
  return `${bytes.toFixed(unit && bytes < 100 ? 1 : 0)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 119.5) return `${seconds.toFixed(0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} d`;
}

const age = (then) => duration(Math.max(0, Math.floor(now() - then)) || 0.1).replace("100 ms", "0 s");
const ago = (then) => `${age(then)} ago`;
const rate = (value) => (value ? `${size(value)}/s` : "–");
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function median(values) {
  const sorted = values.filter((v) => v !== null && v !== undefined).sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : null;
}

function notes(step) {
  const found = Object.entries(step.tags).map(([key, value]) => `${key} ${value}`);
  if (step.held) found.push("held");
  if (step.missing.length) found.push(`waits for rank ${step.missing.slice(0, 8).join(", ")}`);
  if (step.why) found.push(step.why);
  return found.join(" · ");
}

function where(step) {
  return step.tiers.join(", ") || "nowhere";
}

function sentence(step) {
  const parts = [`in ${where(step)}`];
  if (step.state === "undecided" && step.begun_at) parts[0] += `, being written for ${age(step.begun_at)}`;
  if (step.raw_bytes !== null) parts.push(`${size(step.raw_bytes)} raw, ${size(step.stored_bytes)} stored`);
  if (step.raw_rate) parts.push(`${rate(step.raw_rate)} raw, ${rate(step.stored_rate)} stored`);
  if (step.stall_seconds !== null) parts.push(`stall ${duration(step.stall_seconds)}`);
  if (step.sealed_at) parts.push(`taken ${ago(step.sealed_at)}`);
  const more = notes(step);
  if (more) parts.push(more);
  return parts.join(" · ");
}

// ---- parts of a job ---------------------------------------------------------

function showTroubles(list, troubles) {
  while (list.children.length > troubles.length) list.lastChild.remove();
  troubles.forEach((trouble, index) => {
    let item = list.children[index];
    if (!item) {
      item = make("li");
      item.append(make("strong"), " ", make("span"), make("small"));
      list.append(item);
    }
    mark(item, "data-kind", trouble.kind);
    const place = trouble.where.charAt(0).toUpperCase() + trouble.where.slice(1);
    put($(item, "strong"), `${place}:`);
    put($(item, "span"), trouble.why);
    const more = [];
    if (trouble.since) more.push(`For ${age(trouble.since)}.`);
    if (trouble.retry_at > now()) more.push(`Trying again in ${duration(Math.ceil(trouble.retry_at - now()))}.`);
    else if (trouble.retry_at) more.push("Trying again now.");
    if (trouble.hint) more.push(trouble.hint);
    put($(item, "small"), more.join(" "));
  });
}

function figure(section, name, value, note) {
  const place = $(section, `[data-figure="${name}"]`);
  put($(place, "dd"), value);
  put($(place, ".note"), note);
  return place;
}

function showFigures(section, job) {
  const last = job.last_commit;
  const usual = job.interval_seconds;
  const place = figure(
    section, "commit", last ? ago(last.at) : "none yet",
    (last ? `step ${last.step}` : "") + (usual ? `, usually every ${duration(usual)}` : ""));
  const ratio = last && usual ? Math.min(1, Math.max(0, now() - last.at) / job.late_after_seconds) : null;
  const meter = $(place, "meter");
  mark(meter, "value", ratio === null ? null : ratio.toFixed(2));
  mark(meter, "aria-label", ratio === null ? null : "age of the last commit; full is overdue");

  const done = job.steps.filter((step) => step.stall_seconds !== null);
  const stalls = done.map((step) => step.stall_seconds);
  figure(section, "stall", done.length ? duration(stalls[stalls.length - 1]) : "–",
    done.length > 1 ? `median ${duration(median(stalls))}, most ${duration(Math.max(...stalls))}` : "of the training loop");

  const written = job.steps.filter((step) => step.raw_rate);
  const newest = written[written.length - 1];
  figure(section, "rate", newest ? rate(newest.raw_rate) : "–",
    newest ? `raw; ${rate(newest.stored_rate)} stored` : "nothing written yet");

  const alive = job.ranks.filter((rank) => rank.alive).length;
  const world = job.ranks.length ? job.ranks[0].world : 0;
  const waiting = job.ranks.reduce((sum, rank) => sum + rank.undecided, 0);
  figure(section, "ranks", job.ranks.length ? `${alive} of ${job.ranks.length} alive` : "none",
    `${world > job.ranks.length ? `world of ${world}; ` : ""}${plural(waiting, "snapshot")} undecided`
    + (job.spool && job.spool.snapshots ? `; ${size(job.spool.bytes)} in the spool` : ""));
}

function showSteps(section, job) {
  const place = $(section, ".steps");
  mark(section, "class", ["job", job.spool ? "" : "bare", job.mirror ? "" : "plain"].filter(Boolean).join(" "));
  const width = place.clientWidth - 2;
  const steps = job.steps.slice(-Math.max(1, Math.floor(width / COLUMN_PX_MIN)));
  const column = Math.min(COLUMN_PX_MAX, Math.max(COLUMN_PX_MIN, Math.floor(width / (steps.length || 1))));
  place.style.setProperty("--column", `${column}px`);
  showAxis($(section, ".axis"), steps, column);
  const fastest = Math.max(1, ...steps.map((step) => step.raw_rate || 0));
  const known = new Map([...place.children].map((button) => [button.dataset.step, button]));
  const wanted = new Set(steps.map((step) => step.step));
  for (const [id, button] of known) if (!wanted.has(id)) button.remove();
  let before = null;
  for (const step of steps) {
    let button = known.get(step.step);
    if (!button) {
      button = makeColumn(step.step);
      if (before) before.after(button);
      else place.prepend(button);
    }
    showColumn(button, step, fastest);
    before = button;
  }
  const current = pick(job, steps);
  for (const button of place.children) {
    const is = current !== null && button.dataset.step === current.step;
    mark(button, "aria-current", is ? "true" : null);
    button.tabIndex = is ? 0 : -1;
  }
  showChosen(section, current);
}

function showAxis(place, steps, column) {
  const dated = steps.filter((step) => step.sealed_at);
  const ends = dated.length > 7 ? [dated[0], dated[dated.length - 1]] : [];
  place.hidden = !ends.length;
  place.style.setProperty("--span", `${column * steps.length}px`);
  [...place.children].forEach((end, index) => put(end, ends.length ? ago(ends[index].sealed_at) : ""));
}

function pick(job, steps) {
  const wanted = chosen.get(job.label);
  return steps.find((step) => step.step === wanted) || steps[steps.length - 1] || null;
}

function makeColumn(id) {
  const button = make("button");
  button.type = "button";
  button.dataset.step = id;
  const bar = make("span", undefined, "bar");
  bar.append(make("i"), make("i"));
  button.append(bar);
  for (const tier of TIERS) {
    const cell = make("i", undefined, `cell ${tier}`);
    cell.dataset.tier = tier;
    button.append(cell);
  }
  return button;
}

function showColumn(button, step, fastest) {
  const [raw, stored] = button.firstChild.children;
  raw.style.height = `${Math.round((26 * (step.raw_rate || 0)) / fastest)}px`;
  stored.style.height = `${Math.round((26 * Math.min(step.stored_rate || 0, step.raw_rate || 0)) / fastest)}px`;
  for (const cell of button.querySelectorAll(".cell")) {
    const shown = step.tiers.includes(cell.dataset.tier)
      || (cell.dataset.tier === "store" && ["aborted", "retired"].includes(step.state));
    mark(cell, "data-state", shown ? step.state : null);
  }
  const pin = $(button, ".pin");
  if (step.held && !pin) button.append(make("i", undefined, "pin"));
  if (!step.held && pin) pin.remove();
  const held = step.held ? ", held" : "";
  mark(button, "aria-label", `step ${step.step}, ${step.state}${held}, in ${where(step)}`);
}

function showChosen(section, step) {
  const place = $(section, ".chosen");
  if (step === null) {
    put(place, "Nothing was snapshotted yet.");
    return;
  }
  const words = ` ${step.state} · ${sentence(step)}`;
  if (place.dataset.step === step.step && place.children.length) {
    put(place.lastChild, words);
    return;
  }
  place.dataset.step = step.step;
  place.replaceChildren(make("b", step.step), make("span", words));
}

function showTable(section, job) {
  if (!$(section, "details").open) return;
  const body = $(section, "tbody");
  while (body.children.length > job.steps.length) body.lastChild.remove();
  [...job.steps].reverse().forEach((step, index) => {
    const row = body.children[index] || body.insertRow();
    const cells = [
      step.step, step.state, where(step), step.sealed_at ? age(step.sealed_at) : "–", size(step.raw_bytes),
      size(step.stored_bytes), duration(step.seconds), duration(step.stall_seconds), notes(step),
    ];
    cells.forEach((text, column) => {
      const cell = row.children[column] || row.insertCell();
      mark(cell, "class", column > 3 && column < 8 ? "n" : null);
      put(cell, text);
    });
  });
}

// ---- the page ---------------------------------------------------------------

let latest = null;

function sectionOf(job) {
  const known = document.getElementById(`job-${job.label}`);
  if (known) return known;
  const section = $(document, "#job").content.cloneNode(true).firstElementChild;
  section.id = `job-${job.label}`;
  const heading = $(section, "h2");
  heading.id = `name-${job.label}`;
  section.setAttribute("aria-labelledby", heading.id);
  $(section, ".steps").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) choose(section, job.label, button);
  });
  $(section, ".steps").addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" };
    const ends = { Home: "firstElementChild", End: "lastElementChild" };
    const button = event.target.closest("button");
    if (!button) return;
    const next = event.key in moves ? button[moves[event.key]]
      : event.key in ends ? button.parentElement[ends[event.key]] : null;
    if (next) {
      event.preventDefault();
      choose(section, job.label, next);
      next.focus();
    }
  });
  $(section, "details").addEventListener("toggle", show);
  new ResizeObserver(show).observe($(section, ".line"));
  $(document, "#jobs").append(section);
  return section;
}

function choose(section, label, button) {
  // The newest stays the newest: whoever picks it wants to follow.
  if (button === button.parentElement.lastElementChild) chosen.delete(label);
  else chosen.set(label, button.dataset.step);
  show();
}

function show() {
  if (latest === null) return;
  const empty = $(document, "#empty");
  empty.hidden = latest.jobs.length > 0;
  put(empty, "No job yet. The first trainer that enters a Checkpointer on this host appears here.");
  const labels = new Set(latest.jobs.map((job) => `job-${job.label}`));
  for (const section of document.querySelectorAll(".job")) if (!labels.has(section.id)) section.remove();
  for (const job of latest.jobs) {
    const section = sectionOf(job);
    put($(section, "h2"), job.url.replace(/\/+$/, "").split("/").pop() || job.url);
    put($(section, ".url"), job.url);
    put($(section, ".verdict span"), job.verdict.text);
    mark(section, "data-level", job.verdict.level);
    showTroubles($(section, ".troubles"), job.troubles);
    showFigures(section, job);
    showSteps(section, job);
    showTable(section, job);
  }
  put($(document, "#host"), latest.host);
  put($(document, "#daemon"), `ckptmgr ${latest.version}, daemon ${latest.pid}`
    + (latest.max_store_gbps ? `, at most ${latest.max_store_gbps} Gbit/s to and from all stores` : ""));
  const bad = latest.jobs.filter((job) => ["bad", "late"].includes(job.verdict.level)).length;
  document.title = (bad ? `(${bad}) ` : "") + `ckptmgr on ${latest.host}`;
}

function showFreshness() {
  const place = $(document, "#fresh");
  const silent = Date.now() - seenAt;
  const stale = seenAt > 0 && silent > SILENT_MS_MAX;
  place.classList.toggle("stale", stale);
  const clock = new Date(seenAt).toLocaleTimeString();
  put(place, stale ? `The daemon does not answer. This is of ${clock}.` : "");
}

async function refresh() {
  try {
    const reply = await fetch("/page.json", { signal: AbortSignal.timeout(SILENT_MS_MAX) });
    if (!reply.ok) throw new Error(await reply.text());
    latest = await reply.json();
    seenAt = Date.now();
    clockSkew = latest.at - seenAt / 1000;
    show();
  } catch (error) {
    if (seenAt === 0) put($(document, "#empty"), `The daemon does not answer: ${error.message}`);
  }
  showFreshness();
}

async function run() {
  for (;;) {
    if (document.visibilityState === "visible") await refresh();
    await new Promise((done) => setTimeout(done, EVERY_MS));
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") refresh();
});
run();
