/**
 * starcast.js: many channels over one WebSocket, which comes back by itself.
 *
 *     import { connect } from "./live/starcast.js";
 *
 *     const live = connect("/connection/websocket");
 *     const room = live.channel("room:tea", {
 *       onMessage: (data) => show(data),
 *       onSubscribe: ({ recovered }) => { if (recovered === false) reload(); },
 *     });
 *     await room.publish({ text: "hello" });
 *
 * Times are in seconds. A handler that throws is reported as an uncaught error is, and nothing else
 * changes.
 */

/** Connect to an endpoint. Returns at once; what is called before it is connected waits. */
export function connect(url: string | URL, options?: ConnectionOptions): Connection;

export interface ConnectionOptions extends Handlers {
  /** What `on_connect` gets as its token. */
  token?: string;

  /**
   * Returns a token. Called without `token`, when the token has expired, and in time before it does.
   * If it throws, it is called again later; if it returns nothing, the connection ends.
   */
  getToken?: () => Token | Promise<Token>;

  /** What `on_connect` gets as its data: JSON data. */
  data?: unknown;

  /** The page is connected; also each time that it is connected again. `data` is the server's. */
  onConnect?: (connected: { client: string; data: any }) => void;

  /**
   * The connection has ended, or another try has failed. The next try is in `retryIn` seconds, or
   * sooner if the network or the page comes back. `null`: there is none, until `open()` is called.
   */
  onDisconnect?: (ended: { code: number; reason: string; retryIn: number | null }) => void;
}

/**
 * What happens on a channel. Those of a connection are for the channels to which the server
 * subscribes the page and for which there is no `live.channel(...)`. Its `onMessage` also gets what
 * was sent to this client or its user, without a `channel`.
 */
export interface Handlers<Data = any> {
  onMessage?: (data: Data, message: Message) => void;

  /** The page is subscribed, or is subscribed again. What it has missed comes next. */
  onSubscribe?: (subscribed: Subscribed) => void;

  /** The subscription has failed or was ended. It is tried again if the error is `temporary`. */
  onError?: (error: StarcastError) => void;

  /** Somebody joins or leaves. For those whom `on_subscribe` lets know. */
  onJoin?: (member: Member) => void;
  onLeave?: (member: Member) => void;

  /** Who is here: at first, and whenever that changes. A user with several tabs is one member. */
  onMembers?: (members: Member[]) => void;
}

export interface ChannelOptions<Data = any> extends Handlers<Data> {
  /** What `on_subscribe` gets as its token. */
  token?: string;

  /** Returns a token for the channel. See `ConnectionOptions`. */
  getToken?: (channel: string) => Token | Promise<Token>;

  /** What `on_subscribe` gets as its data: JSON data. */
  data?: unknown;

  /** Where the page has been before: the `epoch` and `offset` of a channel. It gets what came since. */
  since?: { epoch: string; offset: number };
}

export interface Connection {
  readonly ready: boolean;

  /** The name of this connection, which others see; it is another one each time. */
  readonly client?: string;

  /** Truthy if it does not come back by itself. */
  readonly ended: unknown;

  /** Subscribe to a channel. Throws if there is such a channel already. */
  channel<Data = any>(name: string, options?: ChannelOptions<Data>): Channel<Data>;

  /** Publish to a channel, subscribed or not. */
  publish(channel: string, data: unknown): Promise<unknown>;

  /** Call a method of the server's, and return its result. */
  rpc<Result = any>(method: string, data?: unknown): Promise<Result>;

  /** Connect again after the end. Channels go on where they were. */
  open(): void;

  /** End it, after what was published in this turn. */
  close(): void;
}

/**
 * Calls wait until the channel is subscribed. Each fails with a `StarcastError` after ten seconds,
 * when the connection is lost before its answer, and when the server refuses it.
 */
export interface Channel<Data = any> {
  readonly name: string;

  /** Whether the page is subscribed. */
  readonly ready: boolean;

  /** Truthy if it does not come back by itself: call `live.channel` for another one. */
  readonly ended?: unknown;

  /** The position of the page, on a channel that has a history. */
  readonly epoch?: string;
  readonly offset?: number;

  publish(data: Data): Promise<unknown>;

  history(options?: {
    limit?: number;
    since?: { epoch: string; offset: number };
    reverse?: boolean;
  }): Promise<{ publications: (Message & { data: Data })[]; epoch: string; offset: number }>;

  /** The clients that are here. */
  presence(): Promise<Member[]>;

  unsubscribe(): void;
}

export interface Message {
  channel?: string;
  offset?: number;

  /** The client that has published it; nothing if it was the server. */
  info?: Member;

  /** `{ encoding: "base64" }` if it was published as bytes. */
  tags?: Record<string, string>;
}

export interface Subscribed {
  channel: string;

  /**
   * Whether the page gets everything that it has missed. False: load what it shows again. Not there
   * if it has missed nothing, because it was never subscribed before.
   */
  recovered?: boolean;

  /** How many messages come next that it has missed. */
  missed: number;

  /** What the server says with the answer. */
  data: any;
}

export interface Member {
  client: string;
  user: string;

  /** The `info` of `Client` and of `Subscription`. */
  conn_info?: any;
  chan_info?: any;
}

/** Codes below 100 are the page's own: 1 timeout, 2 connection lost, 3 closed, 4 no token. */
export interface StarcastError extends Error {
  code: number;
  temporary?: boolean;
}

export type Token = string | null | undefined;
