// Many channels over one WebSocket. starcast.d.ts says how it is used.

const MIN_DELAY = 0.1; // seconds
const MAX_DELAY = 20;
const OFFLINE = 60; // which may be wrong
const STABLE = 20;
const PATIENCE = 10;
const PROBE = 5; // if the connection may be dead
const MAX_FRAME = 20_000; // characters: less than 64 KiB

const fault = (code, message, temporary) => ({ code, message, temporary });
const TIMEOUT = fault(1, "timeout", true);
const LOST = fault(2, "connection lost", true);
const CLOSED = fault(3, "closed");
const UNAUTHORIZED = fault(101, "unauthorized");
const TOKEN_EXPIRED = 109;

const isOffline = () => navigator.onLine === false;
const isFinal = (code) => code === 1009 || (code >= 3500 && code % 1000 >= 500);
const later = (seconds, work) => setTimeout(work, Math.min(seconds * 1000, 2 ** 31 - 1));
const failure = ({ message, ...rest }) => Object.assign(new Error(message), rest);
const who = (member) => member.user || member.client;

const entry = (options, more) => ({
  options,
  token: options.token,
  ready: false,
  since: Infinity, // when it became ready
  failures: 0,
  waiting: new Set(), // commands, until it is ready
  ...more,
});

function tell(it, handler, ...args) {
  try {
    it.options[handler]?.(...args);
  } catch (error) {
    reportError(error);
  }
}

function stop(it) {
  it.ready = false;
  clearTimeout(it.timer);
  clearTimeout(it.renewal);
  it.timer = 0;
}

function delay(it) {
  if (Date.now() - it.since > STABLE * 1000) it.failures = 0;
  it.since = Infinity;
  return Math.max(MIN_DELAY, Math.random() * Math.min(MAX_DELAY, 0.5 * 2 ** it.failures++));
}

export function connect(url, options = {}) {
  const me = entry(options, { ended: CLOSED });
  const channels = new Map();
  const calls = new Map(); // commands that were sent, by id
  const lines = []; // commands of this turn
  let id = 0;
  let attempt; // what was begun in another one is void
  let socket, ping, pong, watchdog, heard, listeners;

  url = new URL(url, document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");

  // The connection

  function open() {
    if (!me.ended) return;
    me.ended = null;
    listeners = new AbortController();
    for (const type of ["online", "offline", "visibilitychange"]) {
      addEventListener(type, () => look(type), { signal: listeners.signal });
    }
    start();
  }

  async function start() {
    stop(me);
    const mine = (attempt = {});
    if (!me.token && options.getToken && !(await fetchToken(me))) return;
    socket = new WebSocket(url);
    watch(PATIENCE);
    socket.onopen = () => {
      const subs = {};
      for (const { name, server, epoch, offset } of channels.values()) {
        if (server) subs[name] = { recover: !!epoch, epoch, offset };
      }
      const params = { token: me.token, data: options.data, subs, name: "starcast.js" };
      call(null, "connect", params, (error, result) => {
        if (mine !== attempt) return;
        if (error) fail(me, error);
        else connected(result);
      });
    };
    socket.onmessage = ({ data }) => {
      heard = Date.now();
      if (me.ready) watch();
      for (const line of data.split("\n")) {
        if (line && mine === attempt) receive(JSON.parse(line));
      }
    };
    socket.onclose = ({ code, reason }) => {
      if (mine === attempt) lose(code, reason, isFinal(code));
    };
  }

  function connected(result) {
    const { client, data, subs = {} } = result;
    ({ ping, pong } = result);
    me.client = client;
    begin(me, result);
    watch();
    for (const it of [...channels.values()]) {
      if (Object.hasOwn(subs, it.name)) continue;
      it.server = false;
      if (it.automatic) end(it, CLOSED);
      else subscribe(it);
    }
    tell(me, "onConnect", { client, data });
    for (const name in subs) {
      if (me.ready) subscribed(find(name), subs[name], true);
    }
  }

  function lose(code, reason, final) {
    clearTimeout(watchdog);
    attempt = null;
    if (socket) socket.onopen = null;
    socket?.close();
    lines.length = 0;
    if (final) me.ended = CLOSED;
    for (const it of [me, ...channels.values()]) {
      stop(it);
      if (final) reject(it.waiting, CLOSED);
    }
    reject(calls.values(), LOST);
    const retryIn = final ? null : isOffline() ? OFFLINE : delay(me);
    if (final) listeners.abort();
    else me.timer = later(retryIn, start);
    tell(me, "onDisconnect", { code, reason, retryIn });
  }

  function look(type) {
    const network = type.endsWith("line");
    const { hidden } = document;
    if (me.ready && (network || (!hidden && Date.now() - heard > PROBE * 1000))) {
      call(null, "ping", {}, () => {});
      watch(PROBE);
    } else if (me.timer && !isOffline() && (network || !hidden)) start();
  }

  function watch(seconds = ping && ping + PATIENCE) {
    clearTimeout(watchdog);
    if (seconds) watchdog = later(seconds, () => fail(me, TIMEOUT));
  }

  // Commands

  // Without `it`, at once
  function call(it, method, params, done) {
    const command = { it, method, params, done };
    command.timer = later(PATIENCE, () => settle(command, TIMEOUT));
    if (!it || it.ready) send(command);
    else it.waiting.add(command);
  }

  function ask(it, method, params) {
    return new Promise((resolve, reject) => {
      const done = (error, result) => (error ? reject(failure(error)) : resolve(result));
      if (it.ended || me.ended) done(CLOSED);
      else call(it, method, params, done);
    });
  }

  function send(command) {
    command.id = ++id;
    calls.set(id, command);
    write({ id, [command.method]: command.params });
  }

  function write(command) {
    if (lines.push(JSON.stringify(command)) === 1) queueMicrotask(flush);
  }

  function flush() {
    while (lines.length) {
      let frame = lines.shift();
      while (frame.length + lines[0]?.length < MAX_FRAME) frame += "\n" + lines.shift();
      socket.send(frame);
    }
  }

  function settle(command, error, result) {
    clearTimeout(command.timer);
    calls.delete(command.id);
    command.it?.waiting.delete(command);
    command.done(error, result);
  }

  function reject(commands, error) {
    for (const command of [...commands]) settle(command, error);
  }

  function receive({ id, push, error, ...reply }) {
    if (id) {
      const command = calls.get(id);
      if (command) settle(command, error, reply[command.method] ?? {});
    } else if (push) {
      const { channel, message, subscribe, pub, join, leave, unsubscribe } = push;
      const it = channels.get(channel);
      if (message) tell(me, "onMessage", message.data, {});
      else if (subscribe) subscribed(find(channel), subscribe, true);
      else if (!it?.ready) return;
      else if (pub) deliver(it, pub);
      else if (join) move(it, "onJoin", join.info, join.info);
      else if (leave) move(it, "onLeave", leave.info, null);
      else if (unsubscribe) {
        const { code, reason } = unsubscribe;
        if (code < 2500 || it.automatic) end(it, fault(code, reason));
        else again(it);
      }
    } else if (pong) write({});
  }

  // Channels

  function add(name, options, automatic) {
    const { epoch, offset } = options.since ?? {};
    const it = entry(options, { name, automatic, epoch, offset, seen: !!epoch });
    const query = (method, params) => ask(it, method, { channel: name, ...params });
    channels.set(name, it);
    return Object.assign(it, {
      publish: (data) => query("publish", { data }),
      history: (options) => query("history", options),
      presence: async () => Object.values((await query("presence")).presence ?? {}),
      unsubscribe: () => it.ended || end(it),
    });
  }

  const find = (name) => channels.get(name) ?? add(name, options, true);

  function channel(name, options = {}) {
    let it = channels.get(name);
    if (it && !it.automatic) throw new Error(`${name} is a channel already`);
    if (it) return Object.assign(it, { options, token: options.token, automatic: false });
    it = add(name, options);
    if (me.ready) subscribe(it);
    return it;
  }

  async function subscribe(it) {
    const mine = attempt;
    const { name, options, epoch, offset } = it;
    if (!it.token && options.getToken && !(await fetchToken(it))) return;
    const { data, onJoin, onLeave, onMembers } = options;
    const join_leave = !!(onJoin || onLeave || onMembers);
    const since = { recover: !!epoch, epoch, offset };
    const params = { channel: name, token: it.token, data, ...since, join_leave };
    call(null, "subscribe", params, (error, result) => {
      if (mine !== attempt || it.ended || it.ready) return;
      if (error) fail(error === TIMEOUT ? me : it, error);
      else subscribed(it, result);
    });
  }

  function subscribed(it, result, server) {
    const { publications = [], epoch, offset = 0, recovered = false, data } = result;
    const context = { channel: it.name, missed: publications.length, data };
    if (it.seen) context.recovered = recovered;
    if (!recovered) it.offset = offset;
    Object.assign(it, { seen: true, epoch, server });
    clearTimeout(it.timer);
    begin(it, result);
    if (it.options.onMembers) loadMembers(it);
    tell(it, "onSubscribe", context);
    for (const pub of publications) if (it.ready) deliver(it, pub);
    if (it.ready) it.offset = Math.max(it.offset, offset);
  }

  function deliver(it, { data, offset, info, tags }) {
    if (offset <= it.offset) return; // it was here already
    if (offset) it.offset = offset;
    tell(it, "onMessage", data, { channel: it.name, offset, info, tags });
  }

  function leave(it) {
    if (me.ready) call(null, "unsubscribe", { channel: it.name }, () => {});
  }

  function again(it, error) {
    if (error && it.ready) leave(it);
    stop(it);
    it.timer = later(delay(it), () => subscribe(it));
    if (error) tell(it, "onError", failure(error));
  }

  function end(it, error) {
    if (!error) leave(it);
    stop(it);
    it.ended = error ?? CLOSED;
    channels.delete(it.name);
    reject(it.waiting, it.ended);
    if (error) tell(it, "onError", failure(error));
  }

  function loadMembers(it) {
    const early = (it.members = new Map()); // what comes before the answer is newer
    it.counted = false;
    call(null, "presence", { channel: it.name }, (error, { presence = {} } = {}) => {
      if (it.members !== early || !it.ready) return;
      if (error) {
        it.members = null;
        if (error.temporary) it.timer = later(PROBE, () => loadMembers(it));
        return tell(it, "onError", failure(error));
      }
      const here = Object.values(presence).map((info) => [who(info), info]);
      it.members = new Map([...here, ...early]);
      it.counted = true;
      showMembers(it);
    });
  }

  function move(it, handler, info, member) {
    tell(it, handler, info);
    it.members?.set(who(info), member);
    if (it.counted) showMembers(it);
  }

  function showMembers(it) {
    for (const [key, member] of it.members) member ?? it.members.delete(key);
    tell(it, "onMembers", [...it.members.values()]);
  }

  function begin(it, result) {
    it.ready = true;
    it.since = Date.now();
    renewLater(it, result);
    for (const command of it.waiting) send(command);
    it.waiting.clear();
  }

  function fail(it, { ...error }) {
    if (error.code === TOKEN_EXPIRED) {
      it.token = null;
      error.temporary = !!it.options.getToken;
    }
    if (it === me) lose(error.code, error.message, !error.temporary);
    else if (error.temporary) again(it, error);
    else end(it, error);
  }

  async function fetchToken(it) {
    const mine = attempt;
    let error = UNAUTHORIZED;
    try {
      it.token = await it.options.getToken(it.name);
    } catch (reason) {
      error = fault(4, `no token: ${reason}`, true);
    }
    if (mine !== attempt || it.ended) return false;
    if (!it.token) fail(it, error);
    return it.token;
  }

  function renewLater(it, { expires, ttl }) {
    clearTimeout(it.renewal);
    if (expires && it.options.getToken) it.renewal = later(ttl, () => renew(it));
  }

  async function renew(it) {
    const mine = attempt;
    it.token = null;
    if (!(await fetchToken(it))) return;
    const params = { channel: it.name, token: it.token };
    call(null, it === me ? "refresh" : "sub_refresh", params, (error, result) => {
      if (mine !== attempt || !it.ready) return;
      if (error) fail(it, error);
      else renewLater(it, result);
    });
  }

  open();
  return Object.assign(me, {
    channel,
    publish: (channel, data) => ask(channels.get(channel) ?? me, "publish", { channel, data }),
    rpc: async (method, data) => (await ask(me, "rpc", { method, data })).data,
    open,
    close: () => me.ended || (flush(), lose(1000, "closed", true)),
  });
}
