"""Updates from eight busy clients, of which none may fail while the proxy is replaced: rolling.py HOST:PORT COUNT

A connection is used until an answer says that it closes. Nothing is sent twice: a request that gets no answer is lost.
"""

import http.client
import sys
import threading

address, count = sys.argv[1], int(sys.argv[2])
CLIENTS = 8
BODY = """<entry xmlns="http://www.w3.org/2005/Atom"><content type="application/vnd.ctct+xml">
<Contact xmlns="http://ws.constantcontact.com/ns/1.0/" id="http://api.constantcontact.com/ws/customers/joesflowers/contacts/1">
<OptInSource>ACTION_BY_CONTACT</OptInSource><ContactLists>
<ContactList id="http://api.constantcontact.com/ws/customers/joesflowers/lists/1"><OptInSource>ACTION_BY_CUSTOMER</OptInSource></ContactList>
</ContactLists></Contact></content></entry>""".encode()
HEADERS = {"Content-Type": "application/atom+xml"}
faults, answers, connections = [], [0] * CLIENTS, [0] * CLIENTS


def run(client):
    connection = None
    for number in range(count // CLIENTS):
        try:
            if connection is None:
                connection = http.client.HTTPConnection(address, timeout=60)
                connections[client] += 1
            connection.request("PUT", f"/ws/customers/joesflowers/contacts/{number}", BODY, HEADERS)
            answer = connection.getresponse()
            answer.read()
            # Which contacts there are is the simulator's business; that the proxy looked and asked is what counts.
            if answer.getheader("optin-proxy") is None or answer.status >= 500:
                raise RuntimeError(f"{answer.status} {answer.headers.items()}")
            answers[client] += 1
            if answer.will_close:
                connection.close()
                connection = None
        except Exception as fault:
            faults.append(repr(fault))
            connection = None


threads = [threading.Thread(target=run, args=(client,)) for client in range(CLIENTS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"{sum(answers)} of {count // CLIENTS * CLIENTS} answered, over {sum(connections)} connections")
print(*faults[:5], sep="\n", end="\n" if faults else "")
sys.exit(bool(faults))
