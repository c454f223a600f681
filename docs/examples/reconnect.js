// Keeps a page connected. Waits longer after each failure, and keeps what cannot be sent yet.
// `url` is where to connect, or a function that returns that each time.

const FINAL = [1003, 1007, 1008, 1009]; // the server refuses this page, or what it sends
const MAX_WAITING = 100; // messages

export function stayConnected(url, onMessage, onStatus = () => {}) {
  const waiting = [];
  let socket;
  let timer;
  let openedAt = null;
  let failures = 0;
  let ended = false;

  function connect() {
    clearTimeout(timer);
    openedAt = null;
    socket = new WebSocket(typeof url === "function" ? url() : url);
    socket.onopen = () => {
      openedAt = Date.now();
      onStatus("open");
      while (waiting.length) socket.send(waiting.shift());
    };
    socket.onmessage = (event) => onMessage(event.data);
    socket.onclose = (event) => {
      if (ended || FINAL.includes(event.code)) {
        ended = true;
        onStatus("closed", event.code);
        return;
      }
      if (openedAt !== null && Date.now() - openedAt > 10_000) failures = 0;
      const seconds = Math.min(30, 0.5 * 2 ** failures) * (0.5 + Math.random() / 2);
      failures += 1;
      timer = setTimeout(connect, seconds * 1000);
      onStatus("waiting", seconds);
    };
  }

  window.addEventListener("online", () => {
    if (!ended && socket.readyState === WebSocket.CLOSED) connect();
  });
  connect();

  return {
    // Returns whether the text was sent, or will be once the page is connected.
    send(text) {
      if (socket.readyState === WebSocket.OPEN) {
        socket.send(text);
        return true;
      }
      if (ended || waiting.length === MAX_WAITING) return false;
      waiting.push(text);
      return true;
    },
    close() {
      ended = true;
      clearTimeout(timer);
      socket.close();
    },
  };
}
