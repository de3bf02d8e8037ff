import java.nio.charset.StandardCharsets;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.Provider;
import java.security.Security;
import java.security.Signature;
import java.security.cert.Certificate;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import javax.crypto.Cipher;

/** Signs with every key of the token through SunPKCS11, and verifies with the platform's own provider. */
public final class SignWithModule {
    public static void main(String[] arguments) throws Exception {
        Provider provider = Security.getProvider("SunPKCS11").configure(arguments[0]);
        Security.addProvider(provider);
        KeyStore store = KeyStore.getInstance("PKCS11", provider);
        store.load(null, arguments.length > 1 ? arguments[1].toCharArray() : null);
        List<String> aliases = Collections.list(store.aliases());
        Collections.sort(aliases);
        for (String alias : aliases) {
            if (!store.isKeyEntry(alias)) {
                System.out.println("certificate " + alias);
                continue;
            }
            PrivateKey key = (PrivateKey) store.getKey(alias, null);
            Certificate[] chain = store.getCertificateChain(alias);
            System.out.println("key " + alias + " " + key.getAlgorithm() + " chain " + chain.length + " encoded " + (key.getEncoded() != null));
            List<String> algorithms = key.getAlgorithm().equals("EC")
                    ? List.of("NONEwithECDSA", "SHA1withECDSA", "SHA256withECDSA", "SHA384withECDSA")
                    : List.of("SHA256withRSA", "SHA512withRSA", "SHA256withRSASSA-PSS");
            for (String algorithm : algorithms) sign(provider, key, chain[0], algorithm);
            if (key.getAlgorithm().equals("RSA")) decrypt(provider, key, chain[0]);
        }
    }

    private static void sign(Provider provider, PrivateKey key, Certificate certificate, String algorithm) {
        String outcome;
        try {
            byte[] message = new byte[32];
            Arrays.fill(message, (byte) 7);
            Signature signer = Signature.getInstance(signing(algorithm), provider);
            parameters(signer, algorithm);
            signer.initSign(key);
            for (int i = 0; i < message.length; i += 8) signer.update(message, i, 8);
            byte[] signature = signer.sign();
            Signature verifier = Signature.getInstance(signing(algorithm), algorithm.contains("EC") ? "SunEC" : "SunRsaSign");
            parameters(verifier, algorithm);
            verifier.initVerify(certificate);
            verifier.update(message);
            outcome = verifier.verify(signature) ? "verified" : "WRONG";
        } catch (Exception error) {
            outcome = "refused " + error.getClass().getSimpleName();
        }
        System.out.println("  " + algorithm + " " + outcome);
    }

    private static String signing(String algorithm) {
        return algorithm.endsWith("PSS") ? "RSASSA-PSS" : algorithm;
    }

    private static void parameters(Signature signature, String algorithm) throws Exception {
        if (algorithm.endsWith("PSS")) {
            signature.setParameter(new java.security.spec.PSSParameterSpec(
                    "SHA-256", "MGF1", java.security.spec.MGF1ParameterSpec.SHA256, 32, 1));
        }
    }

    private static void decrypt(Provider provider, PrivateKey key, Certificate certificate) throws Exception {
        byte[] message = "hello".getBytes(StandardCharsets.UTF_8);
        Cipher encrypter = Cipher.getInstance("RSA/ECB/PKCS1Padding", "SunJCE");
        encrypter.init(Cipher.ENCRYPT_MODE, certificate.getPublicKey());
        Cipher decrypter = Cipher.getInstance("RSA/ECB/PKCS1Padding", provider);
        decrypter.init(Cipher.DECRYPT_MODE, key);
        boolean same = Arrays.equals(decrypter.doFinal(encrypter.doFinal(message)), message);
        System.out.println("  decrypt " + (same ? "same" : "WRONG"));
    }
}
