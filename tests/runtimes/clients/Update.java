import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.Base64;

/** Marks a contact's opt-in as the contact's own, with the JDK's HttpClient. */
class Update {
    public static void main(String[] args) throws Exception {
        var api = System.getenv().getOrDefault("API", "https://api.constantcontact.com");
        var basic = Base64.getEncoder().encodeToString("APIKEY%joesflowers:secret".getBytes());
        var request = HttpRequest.newBuilder(URI.create(api + "/ws/customers/joesflowers/contacts/1"))
                .header("Authorization", "Basic " + basic);
        var client = HttpClient.newHttpClient();

        var contact = client.send(request.build(), BodyHandlers.ofString());
        if (contact.statusCode() != 200) {
            throw new IllegalStateException("GET: " + contact.statusCode());
        }
        var update = contact.body().replace("</EmailAddress>",
                "</EmailAddress><OptInSource>ACTION_BY_CONTACT</OptInSource>");
        var put = request.header("Content-Type", "application/atom+xml").PUT(BodyPublishers.ofString(update));
        var answer = client.send(put.build(), BodyHandlers.ofString());
        System.out.println(answer.statusCode() + " " + answer.headers().firstValue("optin-proxy").orElse(""));
        System.exit(answer.statusCode() == 204 ? 0 : 1);
    }
}
