"use strict";
// The page tells the server 50 times per second, and at once when something changes, what the operator does. It decides
// nothing about safety: the server stops the arm when these messages stay away, and asks for a fresh press afterwards.

const $ = (id) => document.getElementById(id);
const KEYS = { // key -> axis (x y z rx ry rz, base frame, seen from behind the robot), sign
  KeyW: [0, 1], KeyS: [0, -1], KeyA: [1, 1], KeyD: [1, -1], KeyR: [2, 1], KeyF: [2, -1],
  KeyU: [3, 1], KeyO: [3, -1], KeyI: [4, -1], KeyK: [4, 1], KeyJ: [5, 1], KeyL: [5, -1],
};
const COMMANDS = { ArrowRight: "right", ArrowLeft: "left", Escape: "stop" };
const PADS = { // pad -> [axis, metres or radians per pixel] of a drag to the right and upwards, at full speed
  xy: [[1, -0.001], [0, 0.001]], z: [[5, -0.01], [2, 0.001]], tilt: [[3, -0.01], [4, -0.01]],
};
const SIGN_OF_LIFE_MS = 20, PING_MS = 500, RETRY_MS = 500, DEAD_ZONE = 0.12, GRIPPER_MS = 400;
const REACTION_MS = 300; // who presses something this soon after the question has changed answers the one before
let pictureMs = 500; // without a new picture for longer, nobody sees where the arm goes
const FIRST_PINGS = 5, FIRST_PING_MS = 50, TRUSTED_ROUND_TRIP_MS = 2; // events are timed when the clock is known to 1 ms
const COUNTERS = { missed_periods: "late steps", lost_devices: "lost contact", skipped_frames: "pictures skipped",
  rejected_messages: "messages refused", stale_inputs: "inputs too late", unwritten_steps: "steps not on disk yet", sensor_skew_ms: "sensor skew (ms)",
  late_images: "late sensor readings", dropped_images: "lost sensor readings" };
const UNREMARKABLE = ["skipped_frames", "sensor_skew_ms", "unwritten_steps"];

let socket = null, number = 0, refused = false;
let status = { state: "preparing", stage: -1, counters: {}, gripper_open: true };
let stageSince = 0;          // when the page began to show status.stage
let drawn = 0, blind = false; // time of the newest picture, or when pictures began to matter; none came for long
const held = new Set();      // keys of KEYS
const holders = new Set();   // what keeps the dead-man: "space", "button", "trigger", pads
let triggerReleased = false; // a trigger held since before counts as soon as it was seen released
const inVain = new Set();    // of "space", "trigger": held, but since before something made the page let go
let gamepad, gamepadMotion = new Array(6).fill(0), unknownGamepad = ""; // gamepad: index of the one that is read
let gamepadButtons = null;   // as last seen; null: what is pressed then was not meant for us
let clutch = 0, dragged = null;
const pointers = new Map();  // pad -> { id, x, y } of what drags it
let gripper = null, gripperUntil = 0;
const clock = { offset: null, best: Infinity, samples: [] };
const gauges = [];
window.teleop = { shown: 0, sent: 0, clock }; // for measurements

// ---- sending ---------------------------------------------------------------------------------------------------

function send(message) {
  if (!socket || socket.readyState !== WebSocket.OPEN) return;
  number += 1;
  socket.send(JSON.stringify({ n: number, ...message }));
  window.teleop.sent += 1;
}

function sendEvent(name) {
  if (name === "stop" || performance.now() - stageSince > REACTION_MS) send({ type: "event", name, stage: status.stage });
}

function motion() {
  const axes = gamepadMotion.slice(), view = Number($("view").value), speed = Number($("speed").value) / 100;
  for (const key of held) axes[KEYS[key][0]] += KEYS[key][1];
  return axes.map((value, axis) => Math.max(-1, Math.min(1, value)) * speed * seen(axis, view));
}

// Facing the robot, its forward and left are our back and right; heights and turns stay what they are.
function seen(axis, view) { return axis === 2 || axis === 5 ? 1 : view; }

function sendInput(event) {
  if (gripper !== null && (performance.now() > gripperUntil || status.gripper_open === (gripper > 0))) gripper = null;
  const onServer = (time) => (clock.offset === null ? null : time + clock.offset);
  send({ type: "input", stage: status.stage, engaged: holders.size > 0, motion: motion(), drag: dragged ? [clutch, dragged] : null, gripper,
    sent: onServer(performance.now()), at: event && clock.best <= TRUSTED_ROUND_TRIP_MS ? onServer(event.timeStamp) : null });
}

function hold(name, event) {
  if (holders.has(name) || blind) return;
  holders.add(name);
  sendInput(event);
}

function letGo(name, event) {
  if (holders.delete(name)) sendInput(event);
}

function letGoOfEverything() {
  held.clear(); holders.clear(); inVain.clear(); pointers.clear(); dragged = null;
  triggerReleased = false; gamepadMotion.fill(0); gamepadButtons = null;
  for (const pad of document.querySelectorAll(".pad")) pad.classList.remove("held");
  sendInput(null);
}

function toggleGripper(event) {
  const open = gripper === null ? status.gripper_open : gripper > 0;
  gripper = open ? -1 : 1;
  gripperUntil = performance.now() + GRIPPER_MS;
  sendInput(event);
}

// ---- keyboard --------------------------------------------------------------------------------------------------

// Its keys are not ours, and a list that is open swallows releases.
const takesKeys = (target) => target instanceof HTMLSelectElement || (target instanceof HTMLInputElement && target.type === "text");

// While Command is down, macOS does not tell that other keys are released.
for (const kind of ["keydown", "keyup"]) addEventListener(kind, (event) => {
  if (event.metaKey || event.key === "Meta") letGoOfEverything();
});

addEventListener("keydown", (event) => {
  if (takesKeys(event.target)) { if (event.code === "Enter" || event.code === "Escape") event.target.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const known = event.code === "Space" || event.code in KEYS || event.code in COMMANDS || event.code === "KeyG";
  if (known) event.preventDefault();
  if (event.repeat) { if (event.code === "Space" && !holders.has("space")) inVain.add("space"); return; }
  if (event.code === "Space") hold("space", event);
  else if (event.code in KEYS) { held.add(event.code); sendInput(event); }
  else if (event.code in COMMANDS) sendEvent(COMMANDS[event.code]);
  else if (event.code === "KeyG") toggleGripper(event);
  else if (event.key === "y" || event.key === "Y") sendEvent("agree");
  else if (event.key === "+" || event.key === "-") changeSpeed(event.key === "+" ? 10 : -10);
});

addEventListener("keyup", (event) => {
  if (event.code === "Space") { inVain.delete("space"); letGo("space", event); if (!takesKeys(event.target)) event.preventDefault(); }
  if (held.delete(event.code)) sendInput(event);
});

function changeSpeed(step) {
  $("speed").value = Number($("speed").value) + step;
  $("speed").dispatchEvent(new Event("input"));
}

addEventListener("blur", letGoOfEverything);
addEventListener("pagehide", letGoOfEverything);
document.addEventListener("visibilitychange", () => { if (document.hidden) letGoOfEverything(); });
for (const kind of ["focusin", "pointerdown"]) document.addEventListener(kind, (event) => { if (takesKeys(event.target)) letGoOfEverything(); });
// A menu swallows releases.
addEventListener("contextmenu", (event) => { if (takesKeys(event.target)) letGoOfEverything(); else event.preventDefault(); });

// ---- mouse and touch -------------------------------------------------------------------------------------------

function release(element, ended) {
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) element.addEventListener(name, ended);
}

$("hold").addEventListener("pointerdown", (event) => { event.target.closest("button").setPointerCapture(event.pointerId); hold("button", event); });
release($("hold"), (event) => letGo("button", event));

for (const pad of document.querySelectorAll(".pad")) {
  const [across, up] = PADS[pad.dataset.pad];
  pad.addEventListener("pointerdown", (event) => {
    if (pointers.has(pad) || event.button > 0) return;
    pad.setPointerCapture(event.pointerId);
    pointers.set(pad, { id: event.pointerId, x: event.clientX, y: event.clientY });
    if (dragged === null) { clutch += 1; dragged = new Array(6).fill(0); }
    pad.classList.add("held");
    hold(pad.id, event);
  });
  pad.addEventListener("pointermove", (event) => {
    const last = pointers.get(pad);
    if (event.pointerId !== last?.id) return;
    const speed = Number($("speed").value) / 100, view = Number($("view").value);
    dragged[across[0]] += (event.clientX - last.x) * across[1] * speed * seen(across[0], view);
    dragged[up[0]] += (last.y - event.clientY) * up[1] * speed * seen(up[0], view);
    [last.x, last.y] = [event.clientX, event.clientY];
    sendInput(event);
  });
  release(pad, (event) => {
    if (event.pointerId !== pointers.get(pad)?.id) return;
    pointers.delete(pad);
    pad.classList.remove("held");
    letGo(pad.id, event);
    if (!pointers.size) dragged = null;
  });
}

// A second finger, while the first one holds, makes no click; what makes clicks without a pointer has none to press.
$("gripper").addEventListener("pointerdown", (event) => { if (event.button === 0) toggleGripper(event); });
$("gripper").addEventListener("click", (event) => { if (event.detail === 0) toggleGripper(event); });
$("speed").addEventListener("input", () => { $("speedvalue").textContent = `${$("speed").value} %`; });
for (const button of document.querySelectorAll("[data-event]")) button.addEventListener("click", () => { sendEvent(button.dataset.event); button.blur(); });
for (const button of [$("gripper"), $("hold")]) button.addEventListener("focus", () => button.blur());
for (const chosen of [$("speed"), $("view")]) chosen.addEventListener("change", () => chosen.blur());
$("operator").addEventListener("change", () => send({ type: "set", operator: $("operator").value }));
$("move").addEventListener("change", () => { send({ type: "set", move: $("move").checked }); $("move").blur(); });
for (const dialog of [$("review"), $("prompt")]) dialog.addEventListener("cancel", (event) => event.preventDefault());

// ---- gamepad ---------------------------------------------------------------------------------------------------

const axisValue = (value) => (Math.abs(value) < DEAD_ZONE ? 0 : Math.sign(value) * ((Math.abs(value) - DEAD_ZONE) / (1 - DEAD_ZONE)));

function readGamepad() {
  const pads = document.hasFocus() ? [...navigator.getGamepads()].filter((item) => item && item.connected) : [];
  const pad = pads.find((item) => item.mapping === "standard"); // of others nobody knows which axis is which
  unknownGamepad = !pad && pads.length ? pads[0].id : "";
  if (pad?.index !== gamepad) {
    gamepad = pad?.index;
    if (holders.has("trigger")) letGoOfEverything();
    inVain.delete("trigger"); triggerReleased = false; gamepadMotion.fill(0); gamepadButtons = null;
  }
  if (!pad) return;
  const pressed = pad.buttons.map((button) => button.pressed || button.value > 0.5);
  const [lx, ly, rx, ry] = [0, 1, 2, 3].map((index) => axisValue(pad.axes[index] || 0));
  const tilting = pressed[4] || pressed[5];
  const wanted = tilting ? [0, 0, 0, -lx, ly, -rx] : [-ly, -lx, -ry, 0, 0, -rx];
  const changed = wanted.some((value, axis) => value !== gamepadMotion[axis]);
  gamepadMotion = wanted;
  const trigger = Boolean(pressed[6] || pressed[7]), now = { timeStamp: performance.now() };
  if (!trigger) { triggerReleased = true; inVain.delete("trigger"); letGo("trigger", now); }
  else if (triggerReleased) hold("trigger", now);
  else inVain.add("trigger");
  const before = gamepadButtons || pressed, fresh = (index) => pressed[index] && !before[index];
  if (fresh(0)) toggleGripper(now);
  if (fresh(1)) sendEvent("agree");
  if (fresh(2)) sendEvent("left");
  if (fresh(3)) sendEvent("discard");
  if (fresh(9)) sendEvent("right");
  gamepadButtons = pressed;
  if (changed) sendInput(now);
}

setInterval(() => { watchPictures(); readGamepad(); sendInput(null); }, SIGN_OF_LIFE_MS);
const ping = () => send({ type: "ping", at: performance.now() });
setInterval(ping, PING_MS);

// ---- receiving -------------------------------------------------------------------------------------------------

function connect() {
  socket = new WebSocket(new URL("ws", location.href.replace(/^http/, "ws")));
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { number = 0; refused = false; Object.assign(clock, { offset: null, best: Infinity, samples: [] }); letGoOfEverything(); for (let i = 0; i < FIRST_PINGS; i += 1) setTimeout(ping, i * FIRST_PING_MS); offline(""); };
  socket.onclose = (event) => {
    letGoOfEverything();
    offline(refused ? "Another page controls the robot. Close it, and this one takes over."
      : status.state === "finished" ? "The session has ended." : `No connection to the robot (${event.reason || "trying again"}). The arm holds its position.`);
    setTimeout(connect, RETRY_MS);
  };
  socket.onmessage = (event) => {
    if (event.data instanceof ArrayBuffer) { showFrames(event.data); return; }
    const message = JSON.parse(event.data);
    if (message.type === "status") showStatus(message);
    else if (message.type === "episodes") showEpisodes(message.episodes);
    else if (message.type === "pong") synchronise(message);
    else if (message.type === "refused") refused = true;
  };
}

function offline(text) { $("offline").textContent = text; $("offline").hidden = !text; document.body.classList.toggle("lost", Boolean(text)); }

// Offset between the browser's and the server's clock, from the quickest of the latest round trips.
function synchronise(message) {
  const now = performance.now();
  clock.samples.push([now - message.at, message.server_ms - (now + message.at) / 2]);
  clock.samples = clock.samples.slice(-30);
  [clock.best, clock.offset] = clock.samples.reduce((best, sample) => (sample[0] < best[0] ? sample : best));
}

async function showFrames(buffer) {
  const length = new DataView(buffer).getUint16(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 2, length)));
  let start = 2 + length;
  const pictures = head.cameras.map(([name, size]) => {
    const blob = new Blob([new Uint8Array(buffer, start, size)], { type: "image/jpeg" });
    start += size;
    return createImageBitmap(blob).then((bitmap) => [name, bitmap]);
  });
  try {
    for (const [name, bitmap] of await Promise.all(pictures)) draw(name, bitmap);
    drawn = performance.now();
    window.teleop.shown += 1;
  } finally { // or the server would wait for one that cannot be decoded
    send({ type: "shown", frame: head.frame });
  }
}

function draw(name, bitmap) {
  const canvas = cameraCanvas(name);
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    canvas.style.aspectRatio = `${bitmap.width} / ${bitmap.height}`;
  }
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
}

// Nobody drives an arm that they do not see: as long as pictures should come and do not, everything is let go.
function watchPictures() {
  const expected = status.live && ["ready", "recording"].includes(status.state) && socket?.readyState === WebSocket.OPEN;
  if (!expected) drawn = performance.now();
  blind = performance.now() - drawn > pictureMs;
  if (blind) letGoOfEverything();
  $("blind").hidden = !blind;
}

function cameraCanvas(name) {
  const found = document.querySelector(`.camera[data-name="${CSS.escape(name)}"] canvas`);
  if (found) return found;
  const box = make("div", "camera"), canvas = make("canvas");
  box.dataset.name = name;
  box.append(canvas, make("span", "", name));
  $("cameras").append(box);
  return canvas;
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

const PILLS = { preparing: "Preparing", ready: "Ready", recording: "Recording", review: "Review", finished: "Ended" };

function showStatus(next) {
  const before = status;
  status = next;
  if (next.stage !== before.stage) {
    stageSince = Infinity; // nobody has seen it yet
    requestAnimationFrame(() => { if (status.stage === next.stage) stageSince = performance.now(); });
  }
  const { state } = next;
  document.body.dataset.state = state;
  document.body.classList.toggle("active", next.active);
  $("pill").textContent = PILLS[state];
  $("task").textContent = `${next.task} · scene ${next.seed} · ${next.operator}`;
  $("instruction").textContent = next.instruction || "–";
  $("seconds").textContent = (state === "recording" || state === "review" ? next.seconds : 0).toFixed(1);
  $("steps").textContent = `${state === "recording" || state === "review" ? next.steps : 0} steps`;
  $("alarm").textContent = next.alarm; $("alarm").hidden = !next.alarm;
  $("hint").textContent = next.needs_release || inVain.size ? "Let go and press again to move."
    : [next.note, unknownGamepad && `gamepad not used, its layout is unknown: ${unknownGamepad}`].filter(Boolean).join(" · ");
  $("gripperstate").textContent = next.gripper_open ? "open" : "closed";
  if (document.activeElement !== $("operator")) $("operator").value = next.operator;
  $("moverow").hidden = next.move === null;
  if (next.move !== null) $("move").checked = next.move;
  for (const button of document.querySelectorAll(".transport [data-states]")) button.hidden = !button.dataset.states.split(" ").includes(state);
  showGauge(next, before);
  showCounters(next.counters);
  if (JSON.stringify(next.review) !== JSON.stringify(before.review)) showReview(next);
  else if (next.review) $("reviewnote").textContent = next.note;
  toggleDialog($("prompt"), Boolean(next.prompt));
  $("prompttext").textContent = next.prompt;
}

function toggleDialog(dialog, open) {
  if (open && !dialog.open) { dialog.showModal(); document.activeElement.blur(); }
  if (!open && dialog.open) dialog.close();
}

const colour = (value) => (value >= 0.66 ? "#3ecf8e" : value >= 0.33 ? "#f2b84b" : "#ff6b6b");

function showGauge(next, before) {
  if (next.gauge === null) { if (before.gauge !== null) gauges.length = 0; $("gauge").textContent = "–"; $("gaugebar").style.width = "0"; return; }
  $("coach").hidden = false;
  gauges.push(next.gauge);
  if (gauges.length > 200) gauges.shift();
  $("gauge").textContent = `${Math.round(100 * next.gauge)} %`;
  $("gauge").style.color = $("gaugebar").style.background = colour(next.gauge);
  $("gaugebar").style.width = `${100 * next.gauge}%`;
  $("verdict").textContent = next.gauge >= 0.66 ? "like the other demonstrations" : next.gauge >= 0.33 ? "unusual" : "conflicts with earlier demonstrations";
  const canvas = $("trace"), context = canvas.getContext("2d"), step = canvas.width / 200;
  context.clearRect(0, 0, canvas.width, canvas.height);
  gauges.forEach((value, index) => {
    context.fillStyle = colour(value);
    context.fillRect(index * step, canvas.height * (1 - value), Math.ceil(step), Math.max(2, canvas.height * value));
  });
}

let countersShown = 0;

function showCounters(counters) {
  if (performance.now() - countersShown < 500) return;
  countersShown = performance.now();
  const rows = Object.entries(counters).flatMap(([name, value]) => {
    const shown = value === null ? "?" : Number.isInteger(value) ? String(value) : value.toFixed(1);
    return [make("dt", "", COUNTERS[name] || name.replaceAll("_", " ")), make("dd", value > 0 && !UNREMARKABLE.includes(name) ? "attention" : "", shown)];
  });
  if (clock.best < Infinity) rows.push(make("dt", "", "round trip"), make("dd", "", `${clock.best.toFixed(1)} ms`));
  $("counters").replaceChildren(...rows);
}

function showEpisodes(episodes) {
  $("count").textContent = episodes.length ? `· ${episodes.length}` : "";
  $("empty").hidden = episodes.length > 0;
  $("episodes").replaceChildren(...episodes.slice(-100).reverse().map((episode) => {
    const row = make("li"), image = make("img"), text = make("div");
    image.src = `thumb/${episode.name}`; image.alt = ""; image.loading = "lazy";
    image.onerror = () => { image.style.visibility = "hidden"; };
    const score = episode.compatibility === null ? "" : ` · ${Math.round(100 * episode.compatibility)} %`;
    text.append(make("b", "", episode.operator), make("small", "", `${episode.name} · ${episode.seconds} s${score}${episode.move ? " · MOVE" : ""}`));
    row.append(image, text, make("span", episode.success ? "tag" : "tag no", episode.success ? "success" : "no success"));
    return row;
  }));
}

// ---- review ----------------------------------------------------------------------------------------------------

function strip(id) {
  const frames = Number(id.split("-").pop()), box = make("div", "strip");
  box.style.backgroundImage = `url("media/${id}")`;
  box.style.backgroundSize = `${100 * frames}% 100%`;
  if (frames > 1) box.animate([{ backgroundPositionX: "0%" }, { backgroundPositionX: "100%" }],
    { duration: frames * 110, iterations: Infinity, easing: `steps(${frames}, jump-none)` });
  return box;
}

function showReview(next) {
  toggleDialog($("review"), Boolean(next.review));
  if (!next.review) return;
  const { verdict, take } = next.review, rejected = Boolean(verdict && !verdict.accepted);
  $("reviewtitle").textContent = rejected ? "This conflicts with earlier demonstrations" : "Keep this take?";
  $("reviewnote").textContent = next.note;
  if (verdict) $("verdict").textContent = rejected ? `rejected: ${verdict.bad_steps} conflicting steps, ${verdict.tolerance} are tolerated` : "accepted";
  $("takes").replaceChildren(...(rejected && verdict.snippets.length ? [] : Object.values(take).map(strip)));
  $("snippets").replaceChildren(...(rejected ? verdict.snippets : []).map((snippet) => {
    const box = make("div", "snippet"), head = make("header"), pair = make("div", "pair");
    head.append(make("span", "", `steps ${snippet.start}–${snippet.stop}`), make("b", "", `${Math.round(100 * snippet.compatibility)} %`));
    for (const [kind, id, label] of [["poor", snippet.take, "your take"], ["good", snippet.reference, `episode ${snippet.reference_episode}`]]) {
      const side = make("div", kind);
      if (id) side.append(strip(id));
      side.append(label);
      pair.append(side);
    }
    box.append(head, pair);
    return box;
  }));
  $("anyway").hidden = !rejected;
  $("accept").hidden = rejected;
  $("retry").classList.toggle("primary", rejected);
}

connect();
