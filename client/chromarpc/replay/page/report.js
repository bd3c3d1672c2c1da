// The report's comparison of two pictures, and its filters. Without it the page shows the same facts.
(() => {
  const cards = [...document.querySelectorAll(".card")];
  const dialog = document.querySelector("dialog");
  const stage = dialog.querySelector(".stage");
  const [theirs, ours] = [dialog.querySelector(".theirs"), dialog.querySelector(".ours")];
  const range = dialog.querySelector("input");
  const part = (name) => dialog.querySelector(`.${name}`);
  const modes = [...dialog.querySelectorAll("[data-mode]")].filter((one) => one !== stage);
  let shown = -1;
  let mode = "slide";
  let timer = 0;

  const visible = () => cards.filter((card) => !card.hidden && card.dataset.ours);

  function setMode(next) {
    mode = next;
    stage.dataset.mode = mode;
    stage.classList.remove("shown");
    for (const button of modes) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    const sliding = mode === "slide" || mode === "difference";
    range.hidden = !sliding;
    range.min = mode === "difference" ? "1" : "0";
    range.max = mode === "difference" ? "32" : "100";
    range.value = mode === "difference" ? "8" : "50";
    range.setAttribute("aria-label", mode === "difference" ? "Amplification" : "Where the pictures meet");
    clearInterval(timer);
    if (mode === "blink" && !matchMedia("(prefers-reduced-motion: reduce)").matches)
      timer = setInterval(blink, 700);
    slide();
  }

  function fit() {
    const wide = mode === "sides" ? "" : `${dialog.querySelector(".pair").offsetWidth}px`;
    for (const one of [range, part("names")]) one.style.width = wide;
  }

  function blink() {
    stage.classList.toggle("shown");
    names();
  }

  function slide() {
    stage.style.setProperty("--at", `${range.value}%`);
    stage.style.setProperty("--gain", range.value);
    fit();
    names();
  }

  function names() {
    const blinking = stage.classList.contains("shown") ? "ours" : "the trainer's";
    const text = {
      slide: ["the trainer's", "ours"],
      sides: ["the trainer's", "ours"],
      blink: [`now: ${blinking}`, "space changes it"],
      difference: [`difference × ${Math.round(Number(range.value))}`, ""],
    }[mode];
    part("names").replaceChildren(
      ...text.map((one) => Object.assign(document.createElement("span"), { textContent: one })),
    );
  }

  function show(card) {
    shown = cards.indexOf(card);
    const [first, second] = card.querySelectorAll("img");
    theirs.src = card.dataset.theirs === "-" ? first.src : card.dataset.theirs;
    ours.src = card.dataset.ours === "-" ? second.src : card.dataset.ours;
    const small = Number(card.dataset.width) < 512;
    theirs.classList.toggle("small", small);
    part("title").textContent = card.dataset.title;
    part("badges").replaceChildren(
      ...[...card.querySelector(".badges").children].map((one) => one.cloneNode(true)),
    );
    part("prompt").textContent = card.querySelector(".prompt").textContent;
    part("settings").textContent = card.querySelector(".settings").textContent;
    if (!dialog.open) dialog.showModal();
    setMode(mode);
  }

  function go(by) {
    const list = visible();
    const at = list.indexOf(cards[shown]);
    if (list.length) show(list[(at + by + list.length) % list.length]);
  }

  for (const card of cards) card.querySelector(".open")?.addEventListener("click", () => show(card));
  for (const button of modes) {
    const own = button.dataset.mode;
    button.addEventListener("click", () => (own === "blink" && mode === own ? blink() : setMode(own)));
  }
  range.addEventListener("input", slide);
  theirs.addEventListener("load", fit);
  addEventListener("resize", fit);
  part("before").addEventListener("click", () => go(-1));
  part("after").addEventListener("click", () => go(1));
  part("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    clearInterval(timer);
    cards[shown]?.querySelector(".open")?.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (!dialog.open) return;
    const onRange = event.target === range;
    const keys = { s: "slide", b: "blink", d: "difference", v: "sides" };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (keys[event.key]) setMode(keys[event.key]);
    else if (event.key === "ArrowRight" && !onRange) go(1);
    else if (event.key === "ArrowLeft" && !onRange) go(-1);
    else if (event.key === " " && mode === "blink" && event.target.tagName !== "BUTTON") blink();
    else return;
    event.preventDefault();
  });
  const drag = (event) => {
    if (mode !== "slide" || (event.type === "pointermove" && !event.buttons)) return;
    const box = theirs.getBoundingClientRect();
    range.value = String(Math.max(0, Math.min(100, ((event.clientX - box.left) / box.width) * 100)));
    slide();
  };
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);

  const tools = document.querySelector(".tools");
  const filters = [...tools.querySelectorAll("button")];
  for (const button of filters) {
    button.addEventListener("click", () => {
      for (const one of filters) one.setAttribute("aria-pressed", String(one === button));
      const wanted = button.dataset.filter;
      for (const card of cards) card.hidden = wanted !== "all" && card.dataset.kind !== wanted;
      for (const section of document.querySelectorAll("section.step"))
        section.hidden = ![...section.querySelectorAll(".card")].some((card) => !card.hidden);
    });
  }
  tools.classList.add("ready");
  document.body.classList.add("scripted");
  const asked = location.hash ? document.getElementById(location.hash.slice(1)) : null; // a link to one sample
  if (asked?.dataset.ours) show(asked);
})();
