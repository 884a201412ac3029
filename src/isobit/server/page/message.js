// A message on the page.

import { announce, button, copyButton, element, fit, isSend } from "./dom.js";
import { Growing } from "./markdown.js";

/** What the user said; `send(text)`: with another text, from here on. */
export function question(message, send) {
  const text = element("p", { className: "text" }, message.text);
  const article = element("article", { className: "question" });
  article.ariaLabel = "You";
  const actions = element("footer", {},
    button("Edit", edit), copyButton(() => message.text, "Copy your message"));
  const show = () => article.replaceChildren(text, actions);
  show();

  function edit() {
    const area = element("textarea", { value: message.text, rows: 1 });
    area.ariaLabel = "Edit your message; what follows it is dropped";
    const cancel = () => {
      show();
      actions.querySelector("button").focus();
    };
    const resend = () => area.value.trim() && send(area.value);
    area.oninput = () => fit(area);
    area.onkeydown = (event) => {
      if (isSend(event)) {
        event.preventDefault();
        resend();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    };
    const send_ = button("Send again", resend);
    send_.className = "main";
    article.replaceChildren(area, element("footer", {}, send_, button("Cancel", cancel)));
    fit(area);
    area.focus();
  }
  return article;
}

/** What the model says, as it grows. */
export class Answer {
  #thinking = element("div", { className: "text" });
  #folded = element("details", { hidden: true }, element("summary", {}, "Thinking"), this.#thinking);
  #text = element("div", { className: "text" });
  #note = element("p", { className: "quiet", hidden: true });
  #actions = element("footer");
  #verdict = element("p", { className: "verdict" });
  #growing = new Growing(this.#text, (text) => this.#live && announce(text));
  #thoughts = new Growing(this.#thinking);
  #live = false;
  #frame = 0;
  #pause = 0;

  constructor(message) {
    this.message = message;
    this.#verdict.role = "status";
    this.article = element("article", { className: "answer" },
      this.#folded, this.#text, this.#note, this.#actions, this.#verdict);
    this.article.ariaLabel = "Answer";
  }

  /** It has begun. */
  begin() {
    this.#live = true;
    this.#text.ariaBusy = "true";
    this.article.classList.add("live");
  }

  /** The message has grown; shown soon, and less often the longer that takes.
   *
   * follow: called before it is shown; what it gives is called after.
   */
  grown(follow) {
    if (this.#frame) return;
    this.#frame = setTimeout(() => requestAnimationFrame(() => {
      if (!this.#frame) return;
      this.#frame = 0;
      const began = performance.now();
      const followed = follow();
      this.#show(false);
      followed();
      this.#pause = 4 * (performance.now() - began);
    }), this.#pause);
  }

  /** All of it is there. */
  end() {
    clearTimeout(this.#frame);
    this.#frame = 0;
    this.#show(true);
    this.#live = false;
    this.#text.ariaBusy = null;
    this.article.classList.remove("live");
    const { note, stats } = this.message;
    this.#note.hidden = !note;
    this.#note.textContent = note ?? "";
    this.#actions.replaceChildren(copyButton(() => this.message.text, "Copy the answer"));
    if (stats) this.#actions.prepend(element("span", { className: "stats" }, stats));
    const { kind, words } = this.message.verdict ?? {};
    if (words) this.judge(kind, words);
  }

  #show(ended) {
    const { thinking = "", text } = this.message;
    if (thinking) {
      if (this.#live && this.#folded.hidden) announce("Thinking.");
      this.#folded.hidden = false;
      this.#thoughts.show(thinking, ended);
    }
    this.#growing.show(text, ended);
  }

  /** Offer an action beneath it. */
  offer(...buttons) {
    this.#actions.append(...buttons);
  }

  /** What a replay has found: "identical", "different" or "none", and that in words. */
  judge(kind, words) {
    this.#verdict.dataset.kind = kind;
    this.#verdict.textContent = words;
  }
}

/** What went wrong, with a way to try again. */
export function failure(words, again) {
  const made = element("div", { className: "failure" }, element("p", {}, words));
  made.role = "alert";
  if (again) made.append(button("Try again", again));
  return made;
}
