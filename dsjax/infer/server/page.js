"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, kind, text) => Object.assign(document.createElement(tag), { className: kind || "", textContent: text || "" });
let messages = [], running = null, nExperts = 0;

const headers = () => {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
};

// The experts of a token: a row a layer, a column an expert.
function light(span) {
  document.querySelectorAll(".t.on").forEach((one) => one.classList.remove("on"));
  span.classList.add("on");
  const layers = span.experts, canvas = $("map"), size = Math.max(4, Math.floor(320 / nExperts));
  canvas.width = nExperts * size;
  canvas.height = layers.length * Math.max(size, 10);
  const paint = canvas.getContext("2d"), high = canvas.height / layers.length, style = getComputedStyle(document.body);
  layers.forEach((chosen, row) => chosen.forEach((expert, rank) => {
    paint.globalAlpha = 1 - 0.6 * rank / chosen.length;
    paint.fillStyle = style.getPropertyValue("--blue");
    paint.fillRect(expert * size, row * high, size - 1, high - 1);
  }));
  $("token").textContent = JSON.stringify(span.textContent);
  $("drafted").textContent = span.classList.contains("drafted") ? "Drafted, and accepted." : "Sampled.";
  $("inside").hidden = false;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const line = held.slice(0, end);
      held = held.slice(end + 2);
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function send(text) {
  messages.push({ role: "user", content: text });
  $("talk").append(make("div", "message user", text));
  const box = make("div", "message"), content = make("div", "content"), meta = make("div", "meta", "…");
  box.append(content, meta);
  $("talk").append(box);
  running = new AbortController();
  $("send").textContent = "Stop";
  const body = { messages, stream: true, stream_options: { include_usage: true }, want_experts: true };
  for (const name of ["temperature", "top_p", "max_tokens", "thinking_budget"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  let answer = "", thought = null, begin = null, usage = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      for (const choice of chunk.choices) {
        begin = begin || (choice.experts ? performance.now() : null);
        const delta = choice.delta, said = choice.experts || [];
        if (delta.reasoning_content) {
          if (!thought) {
            thought = make("details", "reasoning");
            thought.open = true;
            thought.append(make("summary", "", "Reasoning"), make("div"));
            box.prepend(thought);
          }
          thought.lastChild.append(delta.reasoning_content);
        }
        if (delta.content) {
          if (thought && !answer) thought.open = false;
          answer += delta.content;
          // Token by token where they are the text; a character of several tokens, or text held back, is one piece.
          const whole = said.map((one) => one.token).join("") === delta.content;
          const pieces = whole ? said.map((one) => [one.token, one]) : [[delta.content, said.at(-1)]];
          for (const [piece, one] of pieces) {
            const span = make("span", one && one.drafted ? "t drafted" : "t", piece);
            content.append(span);
            if (!one) continue;
            span.experts = one.layers;
            span.onmouseenter = () => light(span);
            light(span);
          }
        }
        if (delta.tool_calls) content.append(make("pre", "", JSON.stringify(delta.tool_calls, null, 2)));
      }
      $("talk").scrollTop = $("talk").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") box.append(make("div", "error", error.message));
  }
  const parts = [];
  if (usage) {
    const n = usage.completion_tokens, details = usage.completion_tokens_details;
    const drafted = details.accepted_prediction_tokens + details.rejected_prediction_tokens;
    parts.push(`${n} tokens`);
    if (begin && n > 1) parts.push(`${((n - 1) / (performance.now() - begin) * 1000).toFixed(0)} a second`);
    if (drafted) parts.push(`${details.accepted_prediction_tokens} of ${drafted} drafts accepted`);
    if (usage.prompt_tokens_details.cached_tokens) parts.push(`${usage.prompt_tokens_details.cached_tokens} prompt tokens from the cache`);
  }
  meta.textContent = parts.join(", ") || "stopped";
  messages.push({ role: "assistant", content: answer });
  running = null;
  $("send").textContent = "Send";
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  send(text);
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
};
$("clear").onclick = () => {
  if (running) running.abort();
  messages = [];
  $("talk").replaceChildren();
  $("inside").hidden = true;
};
fetch("about").then((response) => response.json()).then((about) => {
  $("model").textContent = about.model;
  nExperts = about.n_routed_experts;
  if (about.chat) return;
  $("talk").append(make("div", "message note", "This model has no chat template: it takes /v1/completions alone."));
});
