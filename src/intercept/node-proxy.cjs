// Preloaded by `optin-proxy exec` (node --require) so that Node versions that cannot read
// HTTPS_PROXY themselves send fetch() and https.request() through the proxy all the same.
// It prints nothing, and where Node's internals are not as expected it changes nothing.
'use strict';

const CONNECT_TIMEOUT = 10_000; // undici's own
const REQUEST = Symbol('optin-proxy.request');

/** The proxy of the environment, or nothing if there is none or Node sees to it itself. */
function proxyOfEnvironment(env) {
  const value = env.https_proxy ?? env.HTTPS_PROXY;
  // Set by `exec` as well, NODE_USE_ENV_PROXY does it all in the versions that have this flag.
  if (!value || process.allowedNodeEnvironmentFlags.has('--use-env-proxy')) return undefined;
  const url = new URL(/^[a-z][a-z0-9+.-]*:\/\//i.test(value) ? value : `http://${value}`);
  if (url.protocol !== 'http:') return undefined;
  const headers = {};
  if (url.username || url.password) {
    const pair = `${decodeURIComponent(url.username)}:${decodeURIComponent(url.password)}`;
    headers['proxy-authorization'] = `Basic ${Buffer.from(pair).toString('base64')}`;
  }
  return { host: unbracketed(url.hostname), port: url.port || 80, name: url.host, headers };
}

function unbracketed(host) {
  return host.replace(/^\[|\]$/g, '');
}

/** NO_PROXY as a predicate on host and port. */
function bypassOfEnvironment(env) {
  const entries = (env.no_proxy ?? env.NO_PROXY ?? '')
    .toLowerCase()
    .split(/[\s,]+/)
    .map((entry) => {
      // A bare IPv6 address does not match and stays whole: its last group is no port.
      const [, v6, name, port] = /^(?:\[(.+)\]|([^:]+))(?::(\d+))?$/.exec(entry) ?? [];
      return { name: (v6 ?? name ?? entry).replace(/^\*?\./, ''), port };
    })
    .filter(({ name }) => name);
  return (host, port) => {
    const wanted = unbracketed(host.toLowerCase()).replace(/\.$/, '');
    return entries.some(
      ({ name, port: only }) =>
        (only === undefined || Number(only) === Number(port)) &&
        (name === '*' || wanted === name || wanted.endsWith(`.${name}`)),
    );
  };
}

/** A function that opens a tunnel and returns its CONNECT request, to destroy or to time. */
function tunnelThrough(proxy) {
  // Taken now: what tests put in their place later is not meant for the way to the proxy.
  const { request } = require('http');
  return (host, port, callback) => {
    const target = `${host.includes(':') ? `[${unbracketed(host)}]` : host}:${port}`;
    const connect = request({
      host: proxy.host,
      port: proxy.port,
      method: 'CONNECT',
      path: target,
      headers: { host: target, connection: 'keep-alive', ...proxy.headers },
      agent: false,
    });
    const refused = (why) => {
      const error = new Error(`proxy ${proxy.name} opened no tunnel to ${target}: ${why}`);
      error.code = 'ERR_PROXY_TUNNEL'; // as Node's own
      return error;
    };
    connect.once('connect', (response, socket, head) => {
      socket.setTimeout(0);
      const { statusCode, statusMessage } = response;
      if (statusCode === 200 && head.length === 0) return callback(null, socket);
      socket.destroy();
      // The client speaks first in TLS, so bytes behind the headers are not the server's.
      const why = statusCode === 200 ? 'data behind its answer' : `${statusCode} ${statusMessage}`;
      callback(Object.assign(refused(why.trim()), { statusCode }));
    });
    connect.on('error', callback);
    connect.end();
    return connect;
  };
}

/** https.request and https.get, as far as they use the default agent. */
function patchHttps(tunnel, bypass) {
  const https = require('https');
  const agent = https.globalAgent;
  const { createSocket, createConnection } = agent;
  if (typeof createSocket !== 'function' || typeof createConnection !== 'function') return;

  // createConnection is not told the request, whose timeout and destroy() have to reach a
  // tunnel in the making: until there is a socket, Node itself has nothing to apply them to.
  agent.createSocket = function (request, options, callback) {
    const own = { __proto__: null, ...options, [REQUEST]: request };
    return createSocket.call(this, request, own, callback);
  };

  agent.createConnection = function (given, callback) {
    const { [REQUEST]: request, ...options } = given;
    const port = options.port || 443;
    const host = options.host;
    if (!request || !host || options.socket || options.path || bypass(host, port)) {
      return createConnection.call(this, options, callback);
    }

    const connect = tunnel(host, port, (error, socket) => {
      if (request.destroy === destroyBoth) delete request.destroy;
      if (error) return callback(error);
      let secure;
      try {
        secure = createConnection.call(this, { ...options, socket });
        // tls.connect leaves the timeout of a socket it is given to whoever gives it.
        if (options.timeout) secure.setTimeout(options.timeout);
      } catch (cause) {
        socket.destroy();
        return callback(cause);
      }
      callback(null, secure);
    });
    if (request.timeout) connect.setTimeout(request.timeout, () => request.emit('timeout'));
    const { destroy } = request;
    function destroyBoth(error) {
      connect.destroy(error); // its own 'error', then, and so the callback's
      return destroy.call(this, error);
    }
    request.destroy = destroyBoth;
    return undefined;
  };
}

/** fetch(), and whatever else uses undici's global dispatcher. */
function patchFetch(tunnel, bypass) {
  // Node 18 warns of its experimental fetch as soon as it loads it, used or not.
  const { emitWarning } = process;
  process.emitWarning = () => {};
  try {
    void globalThis.Request; // loads the internal undici
  } finally {
    process.emitWarning = emitWarning;
  }
  const direct = globalThis[Symbol.for('undici.globalDispatcher.1')];
  // Another class is somebody's intent, such as Node 24.0's own EnvHttpProxyAgent.
  if (direct?.constructor?.name !== 'Agent' || typeof direct.dispatch !== 'function') return;

  const net = require('net');
  const tls = require('tls');
  const tunnelled = new direct.constructor({
    connect({ hostname, port, servername }, callback) {
      let socket;
      let finish = (error, socket) => {
        finish = () => {};
        clearTimeout(timer);
        callback(error, socket);
      };
      const connect = tunnel(hostname, port || 443, (error, raw) => {
        if (error) return finish(error);
        try {
          socket = tls.connect({
            socket: raw,
            host: hostname,
            servername: servername || (net.isIP(hostname) ? '' : hostname),
            ALPNProtocols: ['http/1.1'],
            highWaterMark: 16_384, // undici's own, like the next two lines
          });
          socket.setKeepAlive(true, 60_000);
          socket.setNoDelay(true);
          socket.once('secureConnect', () => finish(null, socket));
          socket.on('error', (cause) => finish(cause));
        } catch (cause) {
          raw.destroy();
          finish(cause);
        }
      });
      const timer = setTimeout(() => {
        const error = new Error(`Connect Timeout Error (${hostname}, ${CONNECT_TIMEOUT} ms)`);
        error.name = 'ConnectTimeoutError';
        error.code = 'UND_ERR_CONNECT_TIMEOUT';
        finish(error);
        (socket ?? connect).destroy();
      }, CONNECT_TIMEOUT);
    },
  });

  // The dispatcher stays the one it was, so that all other requests are as they were.
  const { dispatch } = direct;
  direct.dispatch = function (options, handler) {
    let url;
    try {
      url = new URL(options.origin);
    } catch {
      // dispatch() has its own words for that
    }
    const through = url?.protocol === 'https:' && !bypass(url.hostname, url.port || 443);
    return through ? tunnelled.dispatch(options, handler) : dispatch.call(this, options, handler);
  };
}

try {
  const proxy = proxyOfEnvironment(process.env);
  if (proxy) {
    const tunnel = tunnelThrough(proxy);
    const bypass = bypassOfEnvironment(process.env);
    for (const patch of [patchHttps, patchFetch]) {
      try {
        patch(tunnel, bypass);
      } catch {
        // Each does what it can; a program must start without either.
      }
    }
  }
} catch {
  // A proxy URL that is none: as without it.
}
