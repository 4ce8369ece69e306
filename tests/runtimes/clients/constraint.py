"""Whether Python takes the certificate of a TLS server: constraint.py PORT NAME CA_FILE"""

import socket
import ssl
import sys

port, name, file = sys.argv[1:]
context = ssl.create_default_context(cafile=file)
try:
    with context.wrap_socket(socket.create_connection(("127.0.0.1", int(port))), server_hostname=name):
        print("trusted")
except ssl.SSLError as error:
    print(f"refused: {error}")
