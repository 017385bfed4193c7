"use strict";
const table = document.getElementById("rows");
const heads = [...table.tHead.rows[0].cells];

// Numbers by size, words by alphabet; a second click turns the order round.
function sortBy(column, descending) {
  const value = (row) => row.cells[column].dataset.value;
  const order = (a, b) => Number(value(a)) - Number(value(b)) || value(a).localeCompare(value(b));
  const rows = [...table.tBodies[0].rows].sort((a, b) => (descending ? order(b, a) : order(a, b)));
  table.tBodies[0].append(...rows);
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
}

heads.forEach((head, column) =>
  head.firstElementChild.addEventListener("click", () =>
    sortBy(column, head.getAttribute("aria-sort") === "ascending"),
  ),
);

// report.html#sort=3 opens sorted by the fourth column, #sort=-3 the other way round.
function fromAddress() {
  const found = /^#sort=(-?)(\d+)$/.exec(location.hash);
  if (found && heads[found[2]]) sortBy(Number(found[2]), found[1] === "-");
}
addEventListener("hashchange", fromAddress);
fromAddress();

// The image under the pointer is marked in every strip: the same noise in every row.
for (const strips of document.querySelectorAll(".strips")) {
  strips.addEventListener("pointermove", (event) => {
    const strip = event.target.closest(".strip");
    if (!strip) return;
    const box = strip.getBoundingClientRect();
    const count = Number(getComputedStyle(strip).getPropertyValue("--n"));
    strips.style.setProperty("--at", Math.floor(((event.clientX - box.left) / box.width) * count));
  });
  strips.addEventListener("pointerleave", () => strips.style.removeProperty("--at"));
}
