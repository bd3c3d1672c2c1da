/** In Node: gRPC over HTTP/2. */
import type { ClientSessionOptions, SecureClientSessionOptions } from "node:http2";
import { connect } from "node:net";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { BaseClient } from "./client.js";
import { authorization } from "./connection.js";
import type { ClientOptions } from "./options.js";

export * from "./common.js";

/** Where a server listens unless told otherwise. */
export const DEFAULT_TARGET = "http://127.0.0.1:50051";
/** A generation may say nothing for 10 s; without pings a dead connection would look like a slow one for minutes. */
const PING_INTERVAL_MS = 20_000;
/** Images come in parts of 128 KiB, never of more than 1 MiB; previews whole. */
const READ_MAX_BYTES = 16 * 2 ** 20;

/** How a client connects. */
export interface NodeClientOptions extends ClientOptions {
  /** Of an `https:` target: `ca`, `cert`, `key`, `servername`, as `tls.connect` takes them. */
  readonly tls?: Pick<SecureClientSessionOptions, "ca" | "cert" | "key" | "servername"> | undefined;
}

/** Speaks to one server; connects with the first call. Close it after use. */
export class Client extends BaseClient {
  readonly #sessions: Http2SessionManager;

  /**
   * @param target the server's address: `http://…`, `https://…`, or as the server prints it: `127.0.0.1:50051`,
   *   `[::1]:50051`, `unix:/run/chromarpc.sock`.
   * @throws TypeError no address, or a token that may not be sent.
   */
  constructor(target: string = DEFAULT_TARGET, options: NodeClientOptions = {}) {
    const { url, session } = address(target);
    const interceptors = authorization(url, options);
    const sessions = new Http2SessionManager(
      url,
      { pingIntervalMs: PING_INTERVAL_MS },
      { ...options.tls, ...session },
    );
    super(
      createGrpcTransport({
        baseUrl: url,
        interceptors,
        sessionManager: sessions,
        readMaxBytes: READ_MAX_BYTES,
      }),
      target,
      options,
    );
    this.#sessions = sessions;
  }

  /** Ends every call and the connection. */
  close(): void {
    this.#sessions.abort();
  }
}

/**
 * Where calls go, and how a connection to there is made.
 *
 * @throws TypeError a Unix socket without a file, which not every Node can reach.
 */
function address(target: string): { url: string; session: ClientSessionOptions } {
  if (target.startsWith("unix-abstract:")) {
    throw new TypeError(`${target}: give the server a Unix socket with a file, unix:/path`);
  }
  const path = /^unix:(?:\/\/(?=\/))?(.+)$/.exec(target)?.[1];
  if (path !== undefined) {
    return { url: "http://localhost", session: { createConnection: () => connect(path) } };
  }
  return { url: /^[a-z][a-z0-9+.-]*:\/\//i.test(target) ? target : `http://${target}`, session: {} };
}
