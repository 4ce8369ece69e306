// Whether Java takes the certificate of a TLS server: java Constraint.java PORT NAME PKCS12_FILE
import java.io.FileInputStream;
import java.net.Socket;
import java.security.KeyStore;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLException;
import javax.net.ssl.SSLParameters;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

public class Constraint {
  public static void main(String[] arguments) throws Exception {
    int port = Integer.parseInt(arguments[0]);
    KeyStore trusted = KeyStore.getInstance("PKCS12");
    try (FileInputStream file = new FileInputStream(arguments[2])) {
      trusted.load(file, "changeit".toCharArray());
    }
    TrustManagerFactory managers = TrustManagerFactory.getInstance("PKIX");
    managers.init(trusted);
    SSLContext context = SSLContext.getInstance("TLS");
    context.init(null, managers.getTrustManagers(), null);
    Socket plain = new Socket("127.0.0.1", port);
    try (SSLSocket socket =
        (SSLSocket) context.getSocketFactory().createSocket(plain, arguments[1], port, true)) {
      SSLParameters parameters = socket.getSSLParameters();
      parameters.setEndpointIdentificationAlgorithm("HTTPS");
      socket.setSSLParameters(parameters);
      socket.startHandshake();
      System.out.println("trusted");
    } catch (SSLException error) {
      System.out.println("refused: " + error.getMessage());
    }
  }
}
