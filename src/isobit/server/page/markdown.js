// Markdown as elements. What a model writes is hostile: HTML in it stays text, a link leads to
// http, https or mail, and a picture is a link, so that nothing is fetched because a model says so.

import { copyButton, element } from "./dom.js";
import { highlight } from "./highlight.js";
import { lexer } from "./vendor/marked/marked.esm.js";

const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

/** A text that grows: blocks that are complete stay as they are, the last is made anew. */
export class Growing {
  #target;
  #complete;
  #start = 0; // of the part that is not complete
  #last = [];

  /** complete: is told the plain text of each block, once. */
  constructor(target, complete = () => {}) {
    this.#target = target;
    this.#complete = complete;
  }

  /** Show the text, which begins with what was shown before; `ended`: all of it is there. */
  show(text, ended = false) {
    const found = blocks(text.replace(/\r\n?/g, "\n").slice(this.#start));
    // Blank lines after a list may still be inside it.
    const open = ended ? found.length : found.findLastIndex((token) => token.type !== "space");
    this.#last.forEach((node) => node.remove());
    found.slice(0, Math.max(open, 0)).forEach((token) => {
      this.#start += token.raw.length;
      const made = block(token);
      this.#target.append(...made);
      this.#complete(spoken(token, made));
    });
    this.#last = found.slice(Math.max(open, 0)).flatMap(block);
    this.#target.append(...this.#last);
  }
}

/** What a screen reader says of a block. */
function spoken(token, made) {
  if (token.type !== "code") return made.map((node) => node.textContent).join("");
  const lines = token.text.split("\n").length;
  return `Code${token.lang ? `, ${token.lang}` : ""}, ${lines} ${lines === 1 ? "line" : "lines"}.`;
}

function blocks(text) {
  const plain = text ? [{ type: "plain", raw: text }] : [];
  try {
    const found = lexer(text);
    return found.map((token) => token.raw).join("") === text ? found : plain;
  } catch { // nested too deep for its recursion
    return plain;
  }
}

function block(token) {
  switch (token.type) {
    case "space":
    case "def":
      return [];
    case "heading": // the page's own is the first
      return [element(`h${Math.min(token.depth + 1, 6)}`, {}, ...inline(token.tokens))];
    case "paragraph":
      return [element("p", {}, ...inline(token.tokens))];
    case "text":
      return token.tokens ? inline(token.tokens) : [decoded(token.raw)];
    case "checkbox":
      return checkbox(token);
    case "code":
      return [code(token)];
    case "blockquote":
      return [element("blockquote", {}, ...token.tokens.flatMap(block))];
    case "hr":
      return [element("hr")];
    case "list":
      return [list(token)];
    case "table":
      return [table(token)];
    default: // HTML too
      return [element("p", { className: "plain" }, token.raw)];
  }
}

function list(token) {
  const items = token.items.map((item) => element("li", {}, ...item.tokens.flatMap(block)));
  const made = element(token.ordered ? "ol" : "ul", {}, ...items);
  if (token.ordered) made.start = token.start || 1;
  return made;
}

function checkbox(token) {
  const said = token.checked ? "done" : "to do";
  const box = element("input", { type: "checkbox", checked: token.checked, disabled: true });
  box.ariaLabel = said;
  return [box, " "];
}

function table(token) {
  const row = (tag, cells) =>
    element("tr", {}, ...cells.map((cell) => {
      const made = element(tag, {}, ...inline(cell.tokens));
      if (tag === "th") made.scope = "col";
      if (cell.align) made.style.textAlign = cell.align;
      return made;
    }));
  const made = element("table", {},
    element("thead", {}, row("th", token.header)),
    element("tbody", {}, ...token.rows.map((cells) => row("td", cells))));
  return scrolled(made, "wide", "Table");
}

function code(token) {
  const language = (token.lang ?? "").split(/[\s,{]/)[0].toLowerCase();
  const inner = element("code");
  highlight(inner, token.text, language);
  return element("figure", { className: "code" },
    element("figcaption", {}, element("span", {}, language || "code"),
      copyButton(() => token.text, "Copy the code")),
    scrolled(inner, "", "Code", "pre"));
}

/** What may be wider than the page, and so must be reached by keyboard. */
function scrolled(inner, className, label, tag = "div") {
  const made = element(tag, { className, tabIndex: 0 }, inner);
  made.role = "group"; // a region's name would have to be the only one of the page
  made.ariaLabel = label;
  return made;
}

function inline(tokens) {
  return tokens.flatMap((token) => {
    switch (token.type) {
      case "text":
        return token.tokens ? inline(token.tokens) : [decoded(token.raw)];
      case "escape":
        return [token.text];
      case "strong":
      case "em":
      case "del":
        return [element(token.type, {}, ...inline(token.tokens))];
      case "codespan":
        return [element("code", {}, token.text)];
      case "br":
        return [element("br")];
      case "checkbox":
        return checkbox(token);
      case "link":
        return link(token.href, inline(token.tokens));
      case "image":
        return link(token.href, [`[picture: ${token.text || token.href}]`]);
      default:
        return [token.raw];
    }
  });
}

function link(href, children) {
  let protocol = "";
  try {
    protocol = new URL(href).protocol; // a relative one, to this server, is none
  } catch { /* nor is this */ }
  if (!["http:", "https:", "mailto:"].includes(protocol)) return children;
  return [element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children)];
}

/** A text with the few entities that models write; more of them stay as they are written. */
function decoded(text) {
  return text.replace(/&(?:#(\d{1,7})|([a-z]{2,4}));/g, (all, number, name) =>
    number === undefined ? (NAMED[name] ?? all) : codePoint(Number(number), all));
}

function codePoint(number, otherwise) {
  return number > 31 && number < 0x110000 ? String.fromCodePoint(number) : otherwise;
}
