// Keeps a page connected to a channel that has a history, and loses nothing.

import { stayConnected } from "./reconnect.js";

export function follow(url, onMessage, onHole = () => {}, onStatus = () => {}) {
  let lastId = "";

  function since() {
    const here = new URL(url);
    if (lastId) here.searchParams.set("last_event_id", lastId);
    return here;
  }

  function unwrap(text) {
    const { id, data, recovered } = JSON.parse(text);
    if (data !== undefined) {
      onMessage(data);
      lastId = id ?? lastId; // null if the message is not kept
    } else {
      if (recovered === false) onHole();
      lastId = id;
    }
  }

  return stayConnected(since, unwrap, onStatus);
}
