/** In browsers: gRPC-Web, through a gateway such as `chromarpc-server web`. */
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { BaseClient } from "./client.js";
import { authorization } from "./connection.js";
import type { ClientOptions } from "./options.js";

export * from "./common.js";

/** How a client in a browser connects. */
export interface WebClientOptions extends ClientOptions {
  /** Makes the requests in place of the browser's own `fetch`, to set options such as `keepalive`. */
  readonly fetch?: typeof globalThis.fetch | undefined;
}

/** Speaks to one server. */
export class Client extends BaseClient {
  /**
   * @param target the gateway's address; the page's own origin when left out.
   * @throws TypeError a token that may not be sent.
   */
  constructor(target: string = globalThis.location.origin, options: WebClientOptions = {}) {
    super(
      createGrpcWebTransport({
        baseUrl: target,
        interceptors: authorization(target, options),
        ...(options.fetch && { fetch: options.fetch }),
      }),
      target,
      options,
    );
  }

  /** For symmetry with Node; a browser's connections close by themselves. */
  close(): void {}
}
