// Events as they happen, on a page that is complete without this.  What comes is put in as text; the one thing that is parsed as
// markup is a page of this console itself, through the policy below, and nothing in it is run.
"use strict";

(() => {
  const policy = window.trustedTypes
    ? window.trustedTypes.createPolicy("console", { createHTML: (page) => page })
    : { createHTML: (page) => page };
  const MOST_ROWS = 200;
  const PAUSE = 700; // milliseconds between two looks at what has changed

  function fill(row, event) {
    for (const part of row.querySelectorAll("[data-f]")) {
      const name = part.dataset.f;
      part.textContent = event[name];
      const href = event[name + "_href"];
      if (typeof href === "string" && href.startsWith("/")) part.setAttribute("href", href);
      if (name === "time") part.setAttribute("datetime", event.at);
      if (name === "kind" && /^[a-z]+$/.test(event.tone)) part.classList.add(event.tone);
    }
  }

  async function refresh() {
    const regions = [...document.querySelectorAll("[data-live]")];
    if (!regions.length) return;
    const answer = await fetch(location.href, { credentials: "same-origin", cache: "no-store" });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(policy.createHTML(await answer.text()), "text/html");
    for (const region of regions) {
      const fresh = page.getElementById(region.id);
      if (!fresh || region.contains(document.activeElement) || fresh.isEqualNode(region)) continue;
      const opened = [...region.querySelectorAll("details")].map((one) => one.open);
      region.replaceChildren(...[...fresh.childNodes].map((node) => document.importNode(node, true)));
      region.querySelectorAll("details").forEach((one, n) => { if (n in opened) one.open = opened[n]; });
    }
  }

  function follow(section) {
    const rows = section.querySelector("[data-events]");
    const pattern = section.querySelector("template[data-event-row]");
    const state = section.querySelector("[data-live-state]");
    const source = new EventSource(section.dataset.stream);
    let waiting = 0;
    const say = (text) => { if (state.textContent !== text) state.textContent = text; };
    source.onopen = () => say("Live: new events appear here by themselves.");
    source.onerror = () => say(source.readyState === EventSource.CLOSED
      ? "Not live any more: reload the page." : "The connection is lost; it is tried again.");
    source.onmessage = (message) => {
      const row = pattern.content.cloneNode(true);
      fill(row, JSON.parse(message.data));
      row.querySelector("tr").classList.add("new");
      rows.prepend(row);
      while (rows.rows.length > MOST_ROWS) rows.deleteRow(-1);
      section.querySelector("[data-empty]")?.remove();
      if (!waiting) waiting = setTimeout(() => { waiting = 0; refresh().catch(() => {}); }, PAUSE);
    };
    source.addEventListener("lost", () => say("Some events are not kept any more: reload the page."));
    source.addEventListener("over", () => { source.close(); say("You are not logged in any more."); });
    window.addEventListener("pagehide", () => source.close());
  }

  document.querySelectorAll("[data-stream]").forEach(follow);
})();
