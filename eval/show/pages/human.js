"use strict";
const $ = (id) => document.getElementById(id);
const { pairs, page, ...results } = JSON.parse($("content").textContent);
const SIDE_OF = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "neither" };

let session = JSON.parse(localStorage.getItem(page)) ?? {
  session: Date.now().toString(36) + Math.random().toString(36).slice(2),
  answers: [],
};

function answer(side) {
  if (session.answers.length === pairs.length) return;
  const chosen = side === pairs[session.answers.length].a ? "a" : "b";
  session.answers.push(side === "neither" ? side : chosen);
  show();
}

function undo() {
  session.answers.pop();
  show();
}

function show() {
  const done = session.answers.length;
  const finished = done === pairs.length;
  localStorage.setItem(page, JSON.stringify(session));
  $("judge").hidden = finished;
  $("done").hidden = !finished;
  $("count").textContent = finished ? `${done} of ${done} judged` : `${done + 1} of ${pairs.length}`;
  $("undo").disabled = $("download").disabled = done === 0;
  if (!finished) [$("left").src, $("right").src] = [pairs[done].left, pairs[done].right];
}

function download() {
  const link = document.createElement("a");
  const text = JSON.stringify({ ...results, ...session }, null, 1);
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `human-${session.session}.json`;
  link.click();
}

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (SIDE_OF[event.key]) answer(SIDE_OF[event.key]);
  else if (event.key === "Backspace") undo();
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-side]")) {
  button.addEventListener("click", () => answer(button.dataset.side));
}
$("undo").addEventListener("click", undo);
$("download").addEventListener("click", download);
show();
