// The page: shows what the server hands to this rater and sends back what he presses. No part of it asks anybody else.
"use strict";

const token = location.hash.slice(1);
const rater = new URLSearchParams(location.search).get("rater") || "you";
const at = (id) => document.getElementById(id);
const TITLE = document.title;
const LABELS = { left: 1, right: 0, equal: 0.5, skip: null };
const ENDED = { finished: "Training has finished. Thank you.", labelled: "Everything is answered. Thank you." };
const SPEEDS = { speed1: 0.5, speed2: 1, speed3: 2 };
const PATIENCE = 15000; // ms for a browser to load a clip that it has

let state = null; // what the server said last
let shown = null; // the question on the screen: {number, repeat}
let visibleSince = null; // when its clip began to play; null: it cannot be seen yet
let unseen = false; // its clip cannot be had: it may be skipped, nothing else
let busy = false; // an answer is on its way
let robotShown = null;
let paused = false;
let speed = 1;
let sound = null; // browsers allow one only after a key or a click
let flashing = null;
const began = Date.now();

// Talking to the server ---------------------------------------------------------------------------------------------

async function call(path, body) {
  const options = { headers: { Authorization: `Bearer ${token}` }, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  return fetch(path, options);
}

// The state after `path`; tries again until the server is there. What it has counted already it does not count twice.
async function ask(path, body) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      const response = await call(path, { rater, ...body });
      if (response.ok) {
        if (attempt > 0) notice("");
        return await response.json();
      }
      if (response.status < 500 && response.status !== 429 && response.status !== 408) {
        notice(await response.text());
        return null;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // no connection
    }
    notice(state && state.training.phase in ENDED ? "" :
      `No connection to the run${path === "api/state" ? "" : ": what you pressed has not arrived"}. Training has ` +
      "ended, or it was stopped: then go on with it and open the link that it prints. This page tries again by itself.");
    await new Promise((done) => setTimeout(done, Math.min(250 * 2 ** attempt, 2000)));
  }
}

async function clip(path) {
  for (let attempt = 0; attempt < 20; attempt += 1) {
    try {
      const response = await call(path);
      if (response.ok) return URL.createObjectURL(await response.blob());
      if (response.status !== 429 && response.status !== 503) {
        notice(await response.text());
        return null;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
    }
    await new Promise((done) => setTimeout(done, 500));
  }
  return null;
}

const name = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

// Showing -----------------------------------------------------------------------------------------------------------

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function minutes(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const number = (value) => value.toLocaleString("en");
const share = (value) => `${Math.round(100 * value)} %`;

function take(next) {
  if (next === null) return;
  const before = state;
  state = next;
  if (next.refused) notice(next.refused);
  at("task").textContent = next.task;
  at("who").textContent = rater === "you" ? "" : rater;
  at("undo").disabled = next.undo === null;
  const same = shown && next.question && shown.number === next.question.number && shown.repeat === next.question.repeat;
  if (!same) show(next.question);
  if (next.question && before && !before.question) arrived();
  at("ask").hidden = next.question === null;
  at("idle").hidden = next.question !== null;
  foot();
  if (next.question === null) idle();
}

async function show(question) {
  shown = question;
  visibleSince = null;
  unseen = false;
  const video = at("clip");
  video.pause();
  at("clips").classList.add("changing");
  document.querySelectorAll(".chosen").forEach((item) => item.classList.remove("chosen"));
  if (question === null) return;
  while (shown === question) { // else answered meanwhile in another tab
    const url = await clip(`api/clip?number=${question.number}&repeat=${question.repeat}`);
    if (shown !== question) {
      if (url) URL.revokeObjectURL(url);
      return;
    }
    if (url && await play(video, url)) break;
    if (shown !== question) return;
    if (url) notice("This browser cannot play the clips (MP4, H.264): open the link in another one.");
    unseen = true;
    await new Promise((done) => setTimeout(done, 5000));
  }
  if (shown !== question) return;
  if (unseen) notice("");
  at("clips").classList.remove("changing");
  visibleSince = performance.now();
}

// Whether this browser can play it.
async function play(video, url) {
  if (video.src) URL.revokeObjectURL(video.src);
  video.src = url;
  video.playbackRate = video.defaultPlaybackRate = speed;
  const loaded = new Promise((done) => {
    video.onloadeddata = () => done(true);
    video.onerror = () => done(false);
    setTimeout(done, PATIENCE, false);
  });
  video.play().catch(() => {}); // now: some load nothing before; one that forbids it shows the first picture
  if (await loaded && paused && video.src === url) video.pause();
  return loaded;
}

function foot() {
  const { open, complete, segment, training, you } = state;
  at("answered").max = Math.max(open, 1);
  at("answered").value = complete;
  at("answered").hidden = open === 0;
  at("session").textContent = open === 0 ? "" : `This session: ${complete} of ${open} pairs answered` +
    (state.reviews > 1 ? ` by ${state.reviews} people each` : "");
  at("budget").textContent = training.budget === undefined ? "" :
    `All sessions: ${number(Math.min((training.asked || 0) + complete, training.budget))} of ` +
    `${number(training.budget)} pairs`;
  const slowed = segment.lasts / segment.seconds;
  at("time").textContent = `A clip is ${segment.seconds.toFixed(1)} s of the robot's time` +
    (slowed > 1.05 ? `, slowed down ${slowed.toFixed(1)} times` : "") +
    `. You have been here for ${minutes((Date.now() - began) / 1000)}.`;
  const facts = [];
  if (you.answers) facts.push(`${you.answers} answers`, `${you.median_seconds.toFixed(1)} s each`);
  if (you.consistency !== undefined) facts.push(`the same answer to a repeated pair: ${share(you.consistency)}`);
  if (you.agreement !== undefined) facts.push(`agreement with the others: ${share(you.agreement)}`);
  at("you").textContent = facts.length ? `You: ${facts.join(" · ")}` : "";
}

function idle() {
  const { training, open, complete } = state;
  const others = open > complete;
  const ended = ENDED[training.phase];
  at("doing").textContent = ended ? ended :
    others ? "Waiting for the other people's answers." :
    training.phase === "labelling" ? ENDED.labelled :
    open > 0 && state.wait ? "All answered: training goes on in a moment." :
    open > 0 ? "All answered. The robot is practising; new questions come by themselves." : "The robot is practising.";
  at("trained").hidden = training.total === undefined;
  if (training.total !== undefined && training.step !== undefined) {
    at("trained").value = training.step / training.total;
    at("steps").textContent = `step ${number(training.step)} of ${number(training.total)}` +
      (training.eta !== undefined && !ended ? `, about ${minutes(training.eta)} of training left` : "") +
      (training.return !== undefined ? ` · last return ${training.return.toFixed(1)}` : "");
  }
  if (training.robot !== null && training.robot !== robotShown) {
    robotShown = training.robot;
    clip("api/robot").then((url) => {
      if (url === null) return;
      at("robot-figure").hidden = false;
      play(at("robot"), url);
    });
  }
  curve();
}

function svg(tag, attributes, text) {
  const item = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([key, value]) => item.setAttribute(key, value));
  if (text !== undefined) item.textContent = text;
  return item;
}

// Labels (left axis) and the learned reward's agreement with them (right axis, 0 to 1) over environment steps.
function curve() {
  const points = state.curve;
  at("curve-figure").hidden = points.length === 0;
  if (points.length === 0) return;
  const last = points[points.length - 1].step;
  const most = Math.max(...points.map((p) => p.labels), 1);
  const x = (step) => 30 + 255 * step / last;
  const y = (part) => 155 - 140 * part;
  const line = (chosen, value, colour) => svg("polyline", { fill: "none", stroke: colour, "stroke-width": 2,
    points: chosen.map((p) => `${x(p.step).toFixed(1)},${y(value(p)).toFixed(1)}`).join(" ") });
  const measured = points.filter((p) => p.agreement !== null);
  at("curve").replaceChildren(
    svg("path", { d: "M30 15 V155 H285 V15", fill: "none", stroke: "#d5dae0" }),
    line([{ step: 0, labels: 0 }, ...points], (p) => p.labels / most, "#0b62a8"),
    line(measured, (p) => p.agreement, "#00795a"),
    ...measured.map((p) => svg("circle", { cx: x(p.step), cy: y(p.agreement), r: 2.5, fill: "#00795a" })),
    svg("text", { x: 26, y: 158, "text-anchor": "end" }, "0"),
    svg("text", { x: 26, y: 19, "text-anchor": "end" }, number(most)),
    svg("text", { x: 289, y: 158 }, "0 %"),
    svg("text", { x: 289, y: 19 }, "100 %"),
    svg("text", { x: 30, y: 172 }, "0"),
    svg("text", { x: 285, y: 172, "text-anchor": "end" }, `step ${number(last)}`),
  );
}

// Questions have arrived: a tone, and the title flashes until the page is looked at.
function arrived() {
  if (sound) {
    const tone = sound.createOscillator();
    const volume = sound.createGain();
    volume.gain.setValueAtTime(0.08, sound.currentTime);
    volume.gain.exponentialRampToValueAtTime(0.0005, sound.currentTime + 0.4);
    tone.frequency.value = 660;
    tone.connect(volume).connect(sound.destination);
    tone.start();
    tone.stop(sound.currentTime + 0.4);
  }
  if (!document.hidden && document.hasFocus()) return;
  clearInterval(flashing);
  flashing = setInterval(() => {
    document.title = document.title === TITLE ? "● questions" : TITLE;
  }, 700);
}

function seen() {
  clearInterval(flashing);
  document.title = TITLE;
}
window.addEventListener("focus", seen);

// Answering ---------------------------------------------------------------------------------------------------------

async function act(what) {
  if (sound === null && window.AudioContext) sound = new AudioContext();
  seen();
  if (what in SPEEDS) {
    speed = SPEEDS[what];
    for (const video of [at("clip"), at("robot")]) video.playbackRate = video.defaultPlaybackRate = speed;
    for (const key of Object.keys(SPEEDS)) {
      document.querySelector(`[data-do=${key}]`).setAttribute("aria-pressed", String(key === what));
    }
    return;
  }
  if (what === "pause") {
    paused = !paused;
    for (const video of [at("clip"), at("robot")]) paused || !video.src ? video.pause() : video.play().catch(() => {});
    at("pause").setAttribute("aria-pressed", String(paused));
    return;
  }
  if (busy || state === null) return;
  if (what === "undo") {
    if (state.undo === null) return;
    await send("api/undo", { answer: state.undo });
  } else if (shown !== null && (visibleSince !== null || (unseen && what === "skip"))) { // nobody judges what he has not seen
    document.querySelectorAll(`[data-do=${what}]`).forEach((item) => item.classList.add("chosen"));
    await send("api/answer", { answer: name(), ...shown, label: LABELS[what],
      seconds: visibleSince === null ? 0 : (performance.now() - visibleSince) / 1000 });
  }
}

async function send(path, body) {
  busy = true;
  notice("");
  try {
    take(await ask(path, body));
  } finally {
    busy = false;
  }
}

const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "equal", ArrowDown: "skip", u: "undo", U: "undo",
  " ": "pause", 1: "speed1", 2: "speed2", 3: "speed3" };

document.addEventListener("keydown", (event) => {
  if (!(event.key in KEYS) || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === " " && event.target.closest("button")) return; // it presses the button, as everywhere
  event.preventDefault(); // no scrolling; no second press of a focused button
  act(KEYS[event.key]);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) {
    act(button.dataset.do);
    button.blur();
  }
});

// Looking now and then: at once while nothing is asked, seldom while somebody thinks.
async function look() {
  for (;;) {
    if (!busy) {
      const answer = await ask("api/state", {});
      if (!busy) take(answer);
      if (answer === null) return; // wrong token, or no name: the notice says so
    }
    await new Promise((done) => setTimeout(done, shown === null ? 400 : 2500));
  }
}

if (token) look();
else notice("This link lacks its token: open the link that the run printed, with everything behind the #.");
