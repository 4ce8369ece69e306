// Whether Node takes the certificate of a TLS server: node constraint.mjs PORT NAME CA_FILE
import { readFileSync } from 'node:fs';
import { connect } from 'node:tls';

const [port, servername, file] = process.argv.slice(2);
const socket = connect({ host: '127.0.0.1', port, servername, ca: readFileSync(file) }, () => {
  console.log('trusted');
  socket.destroy();
});
socket.on('error', (error) => console.log(`refused: ${error.code} ${error.message}`));
