"use strict";
const MISSING = "";

// Numbers by size, words by alphabet, what is missing last; a second click turns the order round.
function sortBy(table, column, descending) {
  const value = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => Number(a) - Number(b) || a.localeCompare(b);
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === MISSING || y === MISSING) return (x === MISSING) - (y === MISSING);
    return descending ? compare(y, x) : compare(x, y);
  };
  const heads = [...table.tHead.rows[0].cells];
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) =>
    head.firstElementChild.addEventListener("click", () =>
      sortBy(table, column, head.getAttribute("aria-sort") === "ascending"),
    ),
  );
}

// report.html#speed=3 opens with the table of speed sorted by its fourth column, #speed=-3 the other way.
function fromAddress() {
  const found = /^#(\w+)=(-?)(\d+)$/.exec(location.hash);
  const table = found && document.querySelector(`table.sortable#${found[1]}`);
  if (table && found[3] < table.tHead.rows[0].cells.length) sortBy(table, Number(found[3]), found[2] === "-");
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
