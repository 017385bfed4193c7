"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const total = content.pairs.length;
const place = "fewstep-human-" + content.sealed.slice(0, 24);
const $ = (id) => document.getElementById(id);
const ANSWER_OF = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "neither" };

let session = restored() || fresh();
let since = 0;

function fresh() {
  return { session: Date.now().toString(36) + Math.random().toString(36).slice(2), answers: [], milliseconds: [] };
}

function restored() {
  try {
    const kept = JSON.parse(localStorage.getItem(place));
    const whole = kept && kept.session && Array.isArray(kept.answers) && Array.isArray(kept.milliseconds);
    return whole && kept.answers.length <= total ? kept : null;
  } catch {
    return null;
  }
}

function keep() {
  try {
    localStorage.setItem(place, JSON.stringify(session));
  } catch {
    $("kept").textContent = "This browser keeps nothing: do not close the page before you have downloaded the results.";
  }
}

function results() {
  return { format: content.format, sealed: content.sealed, pairs: total, saved: new Date().toISOString(), ...session };
}

function answer(side) {
  if (session.answers.length >= total) return;
  session.answers.push(side);
  session.milliseconds.push(Math.round(performance.now() - since));
  show();
}

function undo() {
  session.answers.pop();
  session.milliseconds.pop();
  show();
}

function show() {
  const done = session.answers.length;
  const finished = done >= total;
  keep();
  $("judge").hidden = finished;
  $("done").hidden = !finished;
  document.body.classList.toggle("finished", finished);
  $("count").textContent = finished ? `${total} of ${total} judged` : `${done + 1} of ${total}`;
  $("bar").max = total;
  $("bar").value = done;
  $("undo").disabled = $("again").disabled = $("download").disabled = done === 0;
  if (!finished) [$("left").src, $("right").src] = content.pairs[done];
  since = performance.now();
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(results(), null, 1)], { type: "application/json" }));
  link.download = `human-${session.session}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (ANSWER_OF[event.key]) answer(ANSWER_OF[event.key]);
  else if (event.key === "Backspace") undo();
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => answer(button.dataset.answer));
}
$("undo").addEventListener("click", undo);
$("download").addEventListener("click", download);
$("again").addEventListener("click", () => {
  if (!confirm("Throw these answers away and start again?")) return;
  session = fresh();
  show();
});

$("question").textContent = content.question;
// Small images are enlarged, but not so much that one sees pixels and no picture.
$("left").addEventListener("load", () => {
  const width = $("left").naturalWidth;
  document.body.classList.toggle("large", width >= 128);
  document.body.style.setProperty("--size", `${Math.max(Math.min(24 * width, 320), width) + 22}px`);
});
show();
