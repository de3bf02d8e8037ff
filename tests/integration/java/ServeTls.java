import java.io.OutputStream;
import java.security.KeyStore;
import java.security.Provider;
import java.security.Security;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;

/** Serves TLS with a key of the token; says its port, and answers each connection with the name of its cipher suite. */
public final class ServeTls {
    public static void main(String[] arguments) throws Exception {
        Provider provider = Security.getProvider("SunPKCS11").configure(arguments[0]);
        Security.addProvider(provider);
        KeyStore store = KeyStore.getInstance("PKCS11", provider);
        store.load(null, arguments[1].toCharArray());
        KeyManagerFactory keys = KeyManagerFactory.getInstance("PKIX");
        keys.init(store, null);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(keys.getKeyManagers(), null, null);
        try (SSLServerSocket server = (SSLServerSocket) context.getServerSocketFactory().createServerSocket(0)) {
            System.out.println(server.getLocalPort());
            while (true) {
                try (SSLSocket client = (SSLSocket) server.accept(); OutputStream out = client.getOutputStream()) {
                    out.write(client.getSession().getCipherSuite().getBytes());
                } catch (Exception error) {
                    error.printStackTrace();
                }
            }
        }
    }
}
