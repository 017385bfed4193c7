"use strict";
// Numbers by size, words by alphabet, what is missing last; a second click turns the order round.
function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const descending = head.getAttribute("aria-sort") === "ascending";
  const value = (row) => row.cells[column].dataset.value;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const rising = Number(x) - Number(y) || x.localeCompare(y);
    return descending ? -rising : rising;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) =>
    head.firstElementChild.addEventListener("click", () => sortBy(table, column)),
  );
}
// Of the budgets' verdicts the one that the slider names; all of them without this script.
const slider = document.getElementById("budget");
if (slider) {
  const verdicts = [...slider.parentElement.querySelectorAll("li")];
  const show = () => verdicts.forEach((each, i) => (each.hidden = i !== Number(slider.value)));
  slider.hidden = false;
  slider.addEventListener("input", show);
  show();
}
