// Runs clients of the official JavaScript library. Each line of the input is a command in JSON, and
// each line of the output an answer or an event.
import readline from "node:readline";
import WebSocket from "ws";
import { Centrifuge as Json } from "centrifuge";
import { Centrifuge as Protobuf } from "centrifuge/build/protobuf";

const clients = {};
const decode = new TextDecoder();
const encode = new TextEncoder();

const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");

class Client {
  constructor({ client, url, token, tokens, protocol, since }) {
    this.name = client;
    this.binary = protocol === "protobuf";
    const options = { websocket: WebSocket, minReconnectDelay: 20, maxReconnectDelay: 200 };
    if (token !== undefined) options.token = token;
    if (tokens) options.getToken = async () => tokens.shift() ?? "";
    this.library = new (this.binary ? Protobuf : Json)(url, options);
    for (const event of ["connecting", "connected", "disconnected", "error", "message"])
      this.library.on(event, (context) => this.tell(event, context));
    for (const event of ["subscribing", "subscribed", "unsubscribed", "publication", "join", "leave"])
      this.library.on(event, (context) => this.tell(event, context, true));
  }

  // In Protobuf, data is bytes that hold JSON.
  out(data) {
    return this.binary ? encode.encode(JSON.stringify(data ?? null)) : data;
  }

  in(data) {
    return this.binary && data?.length ? JSON.parse(decode.decode(data)) : data;
  }

  tell(event, context, server = false) {
    say({
      client: this.name,
      event,
      server,
      channel: context.channel,
      code: context.code ?? context.error?.code,
      data: this.in(context.data),
      offset: context.offset,
      recovered: context.recovered,
      wasRecovering: context.wasRecovering,
      user: context.info?.user,
      client_id: context.client,
    });
  }

  subscription({ channel, tokens, since }) {
    const options = { minResubscribeDelay: 20, maxResubscribeDelay: 200, joinLeave: true };
    if (tokens) options.getToken = async () => tokens.shift() ?? "";
    if (since) options.since = since;
    const made = this.library.newSubscription(channel, options);
    for (const event of ["subscribing", "subscribed", "unsubscribed", "publication", "join", "leave", "error"])
      made.on(event, (context) => this.tell(event, context));
    return made;
  }

  of(channel) {
    return this.library.getSubscription(channel);
  }
}

const actions = {
  open: (command) => (clients[command.client] = new Client(command)).library.connect(),
  close: (command, it) => it.library.disconnect(),
  reopen: (command, it) => it.library.connect(),
  subscribe: (command, it) => (it.of(command.channel) ?? it.subscription(command)).subscribe(),
  unsubscribe: (command, it) => it.of(command.channel).unsubscribe(),
  publish: async ({ channel, data }, it) => void (await it.library.publish(channel, it.out(data))),
  rpc: async ({ method, data }, it) => it.in((await it.library.rpc(method, it.out(data))).data),
  history: async ({ channel, limit }, it) => {
    const { publications, offset } = await it.of(channel).history({ limit });
    return { offset, data: publications.map((publication) => it.in(publication.data)) };
  },
  presence: async ({ channel }, it) => {
    const { clients } = await it.of(channel).presence();
    return Object.values(clients).map((info) => [info.user, it.in(info.connInfo)]);
  },
  counts: async ({ channel }, it) => {
    const { numClients, numUsers } = await it.of(channel).presenceStats();
    return [numClients, numUsers];
  },
};

readline.createInterface({ input: process.stdin }).on("line", async (line) => {
  const command = JSON.parse(line);
  try {
    const result = await actions[command.do](command, clients[command.client]);
    say({ answer: command.id, result: typeof result === "object" ? result : result ?? null });
  } catch (error) {
    say({ answer: command.id, error: error.code ?? String(error) });
  }
}).on("close", () => process.exit());
