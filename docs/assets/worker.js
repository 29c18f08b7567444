// Browsers refuse workers on pages that are opened from a disk. There, this runs the search's worker in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const script = new URL(url, document.baseURI).href;
      const name = `worker-${Math.random().toString(36).slice(2)}`;
      const begin = `
        window.postMessage = data => parent.dispatchEvent(new MessageEvent("${name}", { data }));
        window.importScripts = (...scripts) => scripts.reduce((before, src) => before.then(() => new Promise(done => {
          const one = document.createElement("script");
          one.src = src; one.onload = done; document.head.append(one);
        })), Promise.resolve());`;
      window.addEventListener(name, event => {
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        if (this.onmessage) this.onmessage(event);
      });
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = `<html><head><script>${begin}<\/script><script src="${script}"><\/script></head></html>`;
      this.ready = new Promise(done => { this.frame.onload = done; });
      document.body.append(this.frame);
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() { this.frame.remove(); }
  };
}
