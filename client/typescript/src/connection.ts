/** How calls reach the server: the signal of a stream, and the token. */
import type { CallOptions, Interceptor } from "@connectrpc/connect";
import type { ClientOptions } from "./options.js";

/** One stream's signal: the caller's, and our own for a loop that is left. */
export class Connection {
  readonly call: CallOptions;
  readonly given: AbortSignal | undefined;
  readonly #own = new AbortController();
  readonly #forward = (): void => this.#own.abort(this.given?.reason);

  constructor(given: AbortSignal | undefined, timeoutMs: number | undefined) {
    this.given = given;
    if (given?.aborted) this.#forward();
    given?.addEventListener("abort", this.#forward, { once: true });
    this.call = { signal: this.#own.signal, ...(timeoutMs !== undefined && { timeoutMs }) };
  }

  close(): void {
    this.given?.removeEventListener("abort", this.#forward);
    this.#own.abort();
  }
}

/**
 * Sends the token with every call.
 *
 * @throws TypeError a token that no header can hold, or that would travel in plain text.
 */
export function authorization(target: string, options: ClientOptions): Interceptor[] {
  const { token, allowInsecureToken = false } = options;
  if (token === undefined) return [];
  if (!allowInsecureToken && !isPrivate(target)) {
    throw new TypeError(
      `the token would travel to ${target} in plain text: use https, or allowInsecureToken`,
    );
  }
  if (typeof token === "string") assertToken(token);
  return [
    (next) => (request) => {
      const current = typeof token === "string" ? token : token();
      if (current !== undefined) {
        assertToken(current);
        request.header.set("authorization", `Bearer ${current}`);
      }
      return next(request);
    },
  ];
}

function assertToken(token: string): void {
  if (!/^[\x21-\x7e]+$/.test(token))
    throw new TypeError("the token is empty or holds characters that no header can carry");
}

function isPrivate(target: string): boolean {
  const { protocol, hostname } = new URL(target);
  return protocol === "https:" || /^(localhost|127(\.\d+){3}|\[::1\])$/.test(hostname);
}
