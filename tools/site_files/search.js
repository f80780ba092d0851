"use strict";
// BOOK: [{page, id, title, chapter, text}], a section each. Every word of the query must begin a word of the section.
const field = document.getElementById("search"), list = document.getElementById("found");
const words = (text) => text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) || [];
const sections = BOOK.map((s) => ({ ...s, heads: words(s.title), all: words(s.text) }));

function score(section, query) {
  let total = 0;
  for (const word of query) {
    const inTitle = section.heads.filter((w) => w.startsWith(word)).length;
    const inText = section.all.filter((w) => w.startsWith(word)).length;
    if (!inTitle && !inText) return 0;
    total += 10 * inTitle + Math.min(inText, 8) * 400 / (400 + section.all.length);
  }
  return total;
}

function show() {
  const query = words(field.value);
  const hits = query.length ? sections.map((s) => [score(s, query), s]).filter((h) => h[0] > 0) : [];
  hits.sort((a, b) => b[0] - a[0]);
  list.replaceChildren(...hits.slice(0, 12).map(([, s]) => {
    const item = document.createElement("li"), link = document.createElement("a");
    const where = document.createElement("small");
    link.href = s.page + "#" + s.id;
    link.textContent = s.title;
    where.textContent = s.chapter;
    item.append(link, where);
    return item;
  }));
  if (query.length && !hits.length) list.textContent = "Nothing found.";
}
field.addEventListener("input", show);
