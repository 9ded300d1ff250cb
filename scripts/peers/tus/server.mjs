// The reference tus server (@tus/server with @tus/file-store) behind a proxy that cuts connections.
//
// node server.mjs DIR PORT_FILE CUTS [TLS]: https with TLS.key and TLS.crt, if given. CUTS is a comma-separated list; the n-th connection ends after that many bytes
// from the client ("-": whole), or, written "aN", once N bytes have passed and before the answer is given.
import { readFileSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import https from 'node:https'
import net from 'node:net'
import { FileStore } from '@tus/file-store'
import { Server } from '@tus/server'

const [directory, portFile, cuts = '', tls = ''] = process.argv.slice(2)
const plan = cuts.split(',').filter(Boolean)
const counts = { connections: 0, cut: 0, bytes: 0, requests: {} }

const tus = new Server({ path: '/storage/v1/upload/resumable', datastore: new FileStore({ directory }) })
const handle = (request, response) => {
  counts.requests[request.method] = (counts.requests[request.method] ?? 0) + 1
  tus.handle(request, response)
}
const server = tls
  ? https.createServer({ key: readFileSync(`${tls}.key`), cert: readFileSync(`${tls}.crt`) }, handle)
  : http.createServer(handle)

const proxy = net.createServer((client) => {
  const cut = plan[counts.connections++] ?? '-'
  const swallow = cut.startsWith('a')
  const limit = cut === '-' ? Infinity : Number(cut.replace('a', ''))
  let passed = 0
  const upstream = net.connect(server.address().port, '127.0.0.1')
  const end = () => {
    client.destroy()
    upstream.destroy()
  }
  client.on('data', (data) => {
    passed += data.length
    counts.bytes += data.length
    if (passed > limit && !swallow) {
      counts.cut++
      upstream.end(data.subarray(0, Math.max(0, data.length - (passed - limit))))
      client.destroy()
      return
    }
    upstream.write(data)
  })
  upstream.on('data', (data) => {
    if (swallow && passed > limit) {
      counts.cut++
      return end()
    }
    client.write(data)
  })
  for (const socket of [client, upstream]) {
    socket.on('error', end)
    socket.on('close', end)
  }
})

server.listen(0, '127.0.0.1', () => {
  proxy.listen(0, '127.0.0.1', () => writeFileSync(portFile, String(proxy.address().port)))
})
process.on('SIGTERM', () => {
  console.log(JSON.stringify(counts))
  process.exit(0)
})
