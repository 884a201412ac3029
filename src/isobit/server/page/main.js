// The page: a conversation, the answer that is coming, and what may be done with both.

import * as api from "./api.js";
import * as conversation from "./conversation.js";
import { announce, button, element, fit, isSend } from "./dom.js";
import { Answer, failure, question } from "./message.js";
import * as settings from "./settings.js";

const at = (id) => document.getElementById(id);
const [list, area, root] = [at("messages"), at("question"), document.documentElement];

let messages = conversation.load();
let last = []; // the conversation before this one
let coming = null; // the answer that is: its message, what stood `before` it, how to end it
let name = ""; // the model's

const RATE = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** Show all of the conversation. */
function show() {
  list.replaceChildren(...messages.map((message, i) => {
    if (message.role === "user") return question(message, (text) => resend(i, text));
    const answer = new Answer(message);
    finish(answer, i);
    return answer.article;
  }));
  at("empty").hidden = messages.length > 0;
  at("back").hidden = !last.length;
}

/** Another conversation in place of this one; what was coming of it ends. */
function change(to) {
  if (coming) busy(false);
  coming?.control.abort();
  coming = null;
  messages = to;
  keep();
  show();
  area.focus();
}

/** What is offered beneath an answer that is complete, the conversation's i-th message. */
function finish(answer, i) {
  answer.end();
  const { receipt } = answer.message;
  answer.offer(button("Regenerate", () => regenerate(i), "Regenerate; what follows is dropped"));
  if (!receipt) return;
  const verify = button("Replay on the CPU", async () => {
    if (verify.ariaDisabled) return; // a button that is disabled would lose the focus
    verify.ariaDisabled = "true";
    answer.judge("none", "Computing it again…");
    try {
      const verdict = await api.replay(receipt);
      const kind = verdict.identical ? "identical" : "different";
      answer.message.verdict = { kind, words: verdict.message };
      answer.judge(kind, verdict.message);
      keep();
    } catch (error) {
      answer.judge("none", error.message);
    }
    verify.ariaDisabled = null;
  });
  answer.offer(verify, button("Receipt", () => download(receipt), "Save the receipt as a file"));
}

function download(receipt) {
  const href = URL.createObjectURL(new Blob([receipt]));
  element("a", { href, download: "receipt.json" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

function keep() {
  if (!conversation.save(standing())) {
    announce("This conversation is not kept: the browser has no room for it.");
  }
}

/** What is there if nothing more comes: an old answer, until its new one has begun. */
function standing() {
  if (!coming) return messages;
  const { before, message } = coming;
  return begun(message) ? [...messages, { note: "Incomplete.", ...message }] : before;
}

function begun(message) {
  return Boolean(message.text || message.thinking);
}

function regenerate(i) {
  respond(messages.slice(0, i), standing());
}

function resend(i, text) {
  respond([...messages.slice(0, i), { role: "user", text }], standing());
}

/** Ask for the answer to a conversation; an answer that is coming ends.
 *
 * before: the conversation that stands until the answer begins.
 */
async function respond(asked, before = asked) {
  coming?.control.abort();
  const message = { role: "assistant", text: "" };
  const own = (coming = { message, before, control: new AbortController() });
  const answer = new Answer(message);
  messages = asked;
  keep();
  show();
  list.append(answer.article);
  answer.begin();
  area.focus();
  busy(true);
  scrollTo({ top: root.scrollHeight });
  let failed = null;
  try {
    await receive(own, () => answer.grown(follow));
  } catch (error) {
    if (own.control.signal.aborted) message.note = "Stopped.";
    else failed = error;
  }
  if (coming !== own) return; // another was asked for
  coming = null;
  if (begun(message) || (!failed && before === asked)) {
    if (failed) message.note = "Incomplete.";
    messages = [...asked, message];
    finish(answer, asked.length);
  } else {
    messages = before;
    show();
  }
  keep();
  busy(false);
  if (failed) tell(failed, () => respond(asked, messages));
  scrollTo({ top: root.scrollHeight });
}

/** End the answer that is coming, with its receipt if the server is there to give it. */
async function stop() {
  const own = coming;
  if (!own) return;
  const abort = () => own.control.abort();
  if (!own.id || own.stopped) return abort();
  own.stopped = true;
  // It may be in the midst of a pass; or know no such answer, as that has ended.
  setTimeout(abort, await api.stop(own.id).then(() => 5000, () => 300));
}

/** Fill a message with what comes. */
async function receive(own, grown) {
  const { message } = own;
  const body = { model: name, messages: conversation.asked(messages, settings.system()) };
  const asked = performance.now();
  let first = 0;
  for await (const piece of api.chat({ ...body, ...settings.fields() }, own.control.signal)) {
    own.id = piece.id;
    const choice = piece.choices[0];
    if (choice) {
      first ||= performance.now();
      message.text += choice.delta.content ?? "";
      if (choice.delta.reasoning_content) {
        message.thinking = (message.thinking ?? "") + choice.delta.reasoning_content;
      }
      if (piece.receipt) message.receipt = piece.receipt;
      if (choice.finish_reason === "length") {
        message.note = own.stopped ? "Stopped." : "Cut: the most tokens were reached.";
      }
      grown();
    } else if (piece.usage) {
      message.stats = measured(piece.usage, asked, first);
    }
  }
}

/** "38 tokens · 410 tokens/s"; the first token's time is the prompt's, and not in the rate. */
function measured(usage, asked, first) {
  const n = usage.completion_tokens;
  const seconds = (performance.now() - first) / 1000;
  const said = [`${n} ${n === 1 ? "token" : "tokens"}`];
  if (n > 1 && seconds > 0) said.push(`${RATE.format((n - 1) / seconds)} tokens/s`);
  if (first) said.push(`first after ${((first - asked) / 1000).toFixed(2)} s`);
  return said.join(" · ");
}

/** Whether the end was in view, and so should stay there, is known before the text grows. */
function follow() {
  const near = root.scrollHeight - root.scrollTop - root.clientHeight < 80;
  return () => near && scrollTo({ top: root.scrollHeight });
}

function tell(error, again) {
  if (error.status === 401) askKey(again, error);
  const words = error instanceof api.Told ? error.message : `This page has a fault: ${error.message}`;
  list.append(failure(words, error.again === false ? null : again));
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  if (yes) at("announcer").replaceChildren();
  announce(yes ? "The model answers." : "The answer is complete.");
}

// The server and its key

async function connect() {
  try {
    name = (await api.model()).id;
    at("model").textContent = at("model").title = name;
    document.title = `${name} · isobit`;
  } catch (error) {
    if (error.status === 401) askKey(connect, error);
    else list.append(failure(error.message, connectAgain));
  }
}

function connectAgain() {
  list.querySelector(".failure")?.remove();
  area.focus();
  connect();
}

/** error: why the key is asked for, if the server did. */
function askKey(then, error = null) {
  const dialog = at("key");
  const wrong = error?.message === api.WRONG_KEY;
  dialog.querySelector("form").onsubmit = (event) => {
    api.setKey(event.target.elements.key.value);
    event.target.reset();
    setTimeout(then);
  };
  dialog.querySelector("input").ariaInvalid = String(wrong);
  if (!dialog.open) dialog.showModal();
  at("key-wrong").textContent = wrong ? `${error.message} Look at it again.` : "";
}

// What people do

at("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = area.value;
  if (!text.trim() || coming) return;
  area.value = "";
  fit(area);
  respond([...messages, { role: "user", text }]);
};
at("stop").onclick = () => {
  stop();
  area.focus();
};
at("new").onclick = () => {
  if (standing().length) last = standing();
  change([]);
};
at("back").onclick = () => change(last);
at("change-key").onclick = () => {
  settings.close();
  askKey(connect);
};
area.oninput = () => fit(area);
area.onkeydown = (event) => {
  if (isSend(event)) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
addEventListener("pagehide", () => {
  if (standing().length) keep(); // an empty tab leaves nothing to the next in place of another's
  conversation.saveDraft(area.value);
});

settings.begin();
area.value = conversation.draft();
fit(area);
show();
if (messages.at(-1)?.role === "user") {
  list.append(failure("There is no answer to this yet.", () => respond(messages)));
}
scrollTo({ top: root.scrollHeight });
connect();
