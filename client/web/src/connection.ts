/** The one client of this page, and what is known of the server behind it. */
import { computed, effect, signal } from "@preact/signals";
import {
  AccessDenied,
  Client,
  type GetServerInfoResponse,
  type Model,
  QuotaExceeded,
  ServerUnavailable,
  type StoredLora,
  StoreUnavailable,
} from "chromarpc/web";
import { store, stored } from "./storage.ts";

const PROBE_MS = 2000;
const REFRESH_MS = 15_000;

/** A secret of whoever runs the server; kept for this tab only. */
export const token = signal(stored(sessionStorage, "token", ""));
/** Whether the server wants a token that this page does not have. */
export const isTokenWanted = signal(false);
/** How the server is, as far as this page knows. */
export const serverState = signal<"unknown" | "up" | "down">("unknown");
export const serverInfo = signal<GetServerInfoResponse | undefined>(undefined);
export const models = signal<readonly Model[]>([]);
export const loras = signal<readonly StoredLora[]>([]);

/** Whether this page is being closed or left. */
let isLeaving = false;
window.addEventListener("pagehide", () => {
  isLeaving = true;
});
window.addEventListener("pageshow", () => {
  isLeaving = false;
});

/** Does something when the page is closed or left; the calls that it makes outlive the page. */
export function whenLeaving(action: () => void): void {
  window.addEventListener("pagehide", action);
}

/** Speaks to the origin that this page came from. */
export const client = new Client(undefined, {
  token: () => token.value || undefined,
  // The page and its calls have one origin: whoever can read the token here has read the page.
  allowInsecureToken: true,
  fetch: (input, init) => fetch(input, isLeaving ? { ...init, keepalive: true } : init),
});

/** Models whose weights are here and can be used, the ones in memory first. */
export const servedModels = computed(() =>
  models.value
    .filter((model) => model.weightsPresent && model.parts.every((part) => part.problem === ""))
    .sort(
      (a, b) =>
        Number(b.resident) - Number(a.resident) || Number(a.aliasOf !== "") - Number(b.aliasOf !== ""),
    ),
);

effect(() => store(sessionStorage, "token", token.value));

/** Takes note of what a call's failure says about the server. */
export function noteFailure(error: unknown): void {
  // A server that has seen too many bad tokens from this address says that it was one too.
  const isBadToken = error instanceof QuotaExceeded && error.metadata.quota === "bad_tokens";
  if (error instanceof AccessDenied || isBadToken) isTokenWanted.value = true;
  // A server whose disk is full answers.
  const isDown = error instanceof ServerUnavailable && !(error instanceof StoreUnavailable);
  if (isDown) serverState.value = "down";
}

/** Reads the list of adapters again. */
export async function refreshLoras(): Promise<void> {
  try {
    loras.value = await client.listLoras();
  } catch (error) {
    noteFailure(error);
  }
}

/** Looks for the server until it is there, and again from time to time. */
export function connect(): void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  async function look(): Promise<void> {
    clearTimeout(timer);
    try {
      if (!document.hidden || serverState.value !== "up") {
        const [info, known] = await Promise.all([client.serverInfo(), client.listModels()]);
        serverInfo.value = info;
        models.value = known;
        if (serverState.value !== "up") {
          serverState.value = "up";
          isTokenWanted.value = false;
          await refreshLoras();
        }
      }
    } catch (error) {
      noteFailure(error);
      if (serverState.value === "unknown" && !isTokenWanted.value) serverState.value = "down";
    }
    timer = setTimeout(() => void look(), serverState.value === "up" ? REFRESH_MS : PROBE_MS);
  }
  // Whoever finds the server down is the first to look again.
  effect(() => {
    if (serverState.value === "down") timer = setTimeout(() => void look(), PROBE_MS);
  });
  window.addEventListener("online", () => void look());
  void look();
  retry = () => void look();
}

/** Looks for the server at once. */
export let retry: () => void = () => undefined;
