/** The real stack for browser tests: server, gateway and Chromium. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const ROOT = fileURLToPath(new URL("../../../", import.meta.url));
/** The server's command. */
export const COMMAND = process.env.CHROMARPC_SERVER ?? path.join(ROOT, ".venv/bin/chromarpc-server");
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
/** Generous, for machines of two busy cores. */
const PATIENCE_MS = 90_000;
export const LORA_ROOT = path.join(ROOT, "server/chromarpc_server/assets/loras");
/** Where screenshots go; nowhere unless asked for. */
const SHOTS = process.env.SHOTS;

/** Why the browser cannot be had; undefined where it can. */
export const noBrowser = existsSync(CHROMIUM)
  ? undefined
  : `no Chromium at ${CHROMIUM}: apt-get install chromium`;

/** A port that nobody listens on now. */
export async function freePort() {
  const listener = createServer();
  listener.listen(0, "127.0.0.1");
  await once(listener, "listening");
  const { port } = listener.address();
  listener.close();
  await once(listener, "close");
  return port;
}

/** Starts a command of the server and waits for a line. */
async function start(flags, wanted) {
  const child = spawn(COMMAND, flags, { stdio: ["ignore", "pipe", "inherit"] });
  const lines = createInterface(child.stdout);
  const exit = once(child, "exit");
  await new Promise((resolve, reject) => {
    lines.on("line", (line) => wanted.test(line) && resolve());
    exit.then(([code]) => reject(new Error(`${flags.join(" ")} ended with exit code ${code}`)));
  });
  return {
    async stop(signal = "SIGTERM") {
      child.kill(signal);
      await exit;
    },
  };
}

const MODEL = ["--preload", "chroma-mini", "--threads", "2", "--grace-s", "0", "--log-level", "error"];

/** A folder for uploads and jobs, removed at the end. */
export async function dataFolder(test) {
  const folder = await mkdtemp(path.join(tmpdir(), "chromarpc-web-"));
  test.after(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

/** Server and gateway in one process, as a stranger starts them. */
export async function startStack(test, ...flags) {
  const webPort = await freePort();
  const port = await freePort();
  const data = await dataFolder(test);
  const own = [
    "web",
    "--port",
    `${port}`,
    "--web-port",
    `${webPort}`,
    "--data-dir",
    data,
    "--lora-root",
    LORA_ROOT,
  ];
  const running = await start([...own, ...MODEL, ...flags], /adapters:/);
  test.after(() => running.stop());
  const url = `http://127.0.0.1:${webPort}/`;
  // The gateway looks at the server's health once a second.
  while ((await fetch(`${url}health`)).status === 503)
    await new Promise((resolve) => setTimeout(resolve, 50));
  /** Whether jobs outlive their callers on this server. */
  async function hasJobs() {
    const headers = { "content-type": "application/grpc-web+proto" };
    const body = new Uint8Array(5);
    const answer = await fetch(`${url}chromarpc.v1.JobService/ListJobs`, { method: "POST", headers, body });
    return answer.headers.get("grpc-status") !== "12";
  }
  return { url, port, webPort, data, hasJobs };
}

/** A server alone. */
export function startServer(port, data, ...flags) {
  return start(
    ["--port", `${port}`, "--data-dir", data, "--lora-root", LORA_ROOT, ...MODEL, ...flags],
    /adapters:/,
  );
}

/** A gateway alone, whether or not its server is there. */
export async function startGateway(test, port) {
  const webPort = await freePort();
  const flags = [
    "web",
    "--web-port",
    `${webPort}`,
    "--web-upstream",
    `127.0.0.1:${port}`,
    "--log-level",
    "error",
  ];
  const running = await start(flags, /The page is/);
  test.after(() => running.stop());
  return { url: `http://127.0.0.1:${webPort}/`, webPort };
}

/** Chromium, without its own errands in the network. */
export async function launch(test, ...flags) {
  const browser = await chromium.launch({
    executablePath: CHROMIUM,
    args: [
      ...["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"],
      ...["--disable-background-networking", "--disable-component-update", "--disable-sync", ...flags],
    ],
  });
  test.after(() => browser.close());
  return browser;
}

/** A page that fails the test where its console does. */
export async function open(browser, url, options = {}) {
  const { allowed = /^$/, ...context } = options;
  const tab = await (
    await browser.newContext({ viewport: { width: 1280, height: 860 }, ...context })
  ).newPage();
  tab.setDefaultTimeout(PATIENCE_MS);
  const complaints = [];
  tab.on("pageerror", (error) => complaints.push(error.message));
  tab.on("console", (message) => {
    if (message.type() === "error" && !allowed.test(message.text())) complaints.push(message.text());
  });
  await tab.goto(url);
  return Object.assign(tab, { complaints });
}

/** Keeps a picture of the page, where wanted. */
export async function shot(tab, name) {
  if (SHOTS === undefined) return;
  await mkdir(SHOTS, { recursive: true });
  await tab.screenshot({ path: path.join(SHOTS, `${name}.png`) });
}

/** Fills the form's fields by their labels. */
export async function fill(tab, values) {
  for (const [label, value] of Object.entries(values))
    await tab.getByLabel(label, { exact: true }).fill(value);
}

/**
 * Drags files or folders from outside over the page, as a person does, and lets them go.
 *
 * @param hover called while they are held there.
 */
export async function drop(tab, paths, { x = 700, y = 400, hover = async () => {} } = {}) {
  const session = await tab.context().newCDPSession(tab);
  const data = { items: [], files: [paths].flat(), dragOperationsMask: 1 };
  for (const type of ["dragEnter", "dragOver"])
    await session.send("Input.dispatchDragEvent", { type, x, y, data });
  await hover();
  await session.send("Input.dispatchDragEvent", { type: "drop", x, y, data });
  await session.detach();
}

/** A point within an element, to drop something on. */
export async function middleOf(element) {
  const { x, y, width, height } = await element.boundingBox();
  return { x: x + width / 2, y: y + height / 2 };
}

/** Presses the button that draws. */
export async function draw(tab) {
  await tab.getByRole("button", { name: /^Draw/ }).click();
}

/** Waits until the status line says something, and gives what it says. */
export async function status(tab, wanted) {
  const line = tab.locator(".status", { hasText: wanted });
  await line.waitFor();
  return line.textContent();
}

/**
 * What sticks out of the window, is cut off, or is too small to press; empty where all is well. `innerWidth` would not
 * do: on a phone it grows with what sticks out.
 *
 * @param width of the window in CSS pixels, to set first; as it is when left out.
 */
export async function misfits(tab, width) {
  if (width !== undefined) await tab.setViewportSize({ width, height: 860 });
  return tab.evaluate(() => {
    const MIN_PX = 24;
    const width = Math.round(visualViewport.width * visualViewport.scale);
    const found = [];
    const { scrollWidth } = document.documentElement;
    if (scrollWidth > width) found.push(`the page is ${scrollWidth} px wide in a window of ${width} px`);
    for (const element of document.querySelectorAll(
      "a, button, dialog, input, label, meter, output, progress, select, summary, textarea, img, .notice",
    )) {
      const box = element.getBoundingClientRect();
      if (box.width === 0 || element.classList.contains("visually-hidden")) continue;
      const name = `${element.localName} “${(element.ariaLabel ?? element.textContent).trim().slice(0, 40)}”`;
      const place = `${Math.round(box.left)} to ${Math.round(box.right)} px`;
      if (box.left < -0.5 || box.right > width + 0.5) found.push(`${name} lies at ${place} of ${width} px`);
      for (let around = element.parentElement; around !== null; around = around.parentElement) {
        if (around.localName === "html" || around.localName === "body") break;
        const edge = around.getBoundingClientRect();
        const isCut = getComputedStyle(around).overflowX !== "visible" && box.right > edge.right + 0.5;
        if (isCut) found.push(`${name}, ${place}, is cut off at ${Math.round(edge.right)} px`);
      }
      if (!element.matches("a, button, input, select, summary, textarea")) continue;
      const pressed = (element.closest("label") ?? element).getBoundingClientRect();
      if (Math.min(pressed.width, pressed.height) < MIN_PX)
        found.push(`${name} is ${Math.round(pressed.width)} × ${Math.round(pressed.height)} px small`);
    }
    return found;
  });
}
