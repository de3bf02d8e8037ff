import java.security.KeyFactory;
import java.security.KeyPair;
import java.security.KeyPairGenerator;
import java.security.KeyStore;
import java.security.MessageDigest;
import java.security.PrivateKey;
import java.security.Provider;
import java.security.PublicKey;
import java.security.SecureRandom;
import java.security.Security;
import java.security.Signature;
import java.security.spec.AlgorithmParameterSpec;
import java.security.spec.ECGenParameterSpec;
import java.security.spec.MGF1ParameterSpec;
import java.security.spec.PSSParameterSpec;
import java.security.spec.X509EncodedKeySpec;
import java.util.Arrays;
import java.util.List;
import javax.crypto.Cipher;
import javax.crypto.KeyAgreement;
import javax.crypto.KeyGenerator;
import javax.crypto.Mac;
import javax.crypto.SecretKey;
import javax.crypto.SecretKeyFactory;
import javax.crypto.spec.GCMParameterSpec;
import javax.crypto.spec.IvParameterSpec;
import javax.crypto.spec.SecretKeySpec;

/** Makes keys in the token through SunPKCS11, uses them there, and does the same again with the platform's own providers. */
public final class OwnKeys {
    private static final byte[] MESSAGE = new byte[100_000];
    private static Provider provider;

    private interface Check {
        boolean holds() throws Exception;
    }

    public static void main(String[] arguments) throws Exception {
        provider = Security.getProvider("SunPKCS11").configure(arguments[0]);
        Security.addProvider(provider);
        for (int i = 0; i < MESSAGE.length; i++) MESSAGE[i] = (byte) (i * 31);
        KeyStore store = KeyStore.getInstance("PKCS11", provider);
        store.load(null, arguments[1].toCharArray());
        ciphers();
        macsAndDigests();
        agreements();
        signatures();
        entries(store);
    }

    private static void report(String what, Check check) {
        String outcome;
        try {
            outcome = check.holds() ? "same" : "WRONG";
        } catch (Exception error) {
            outcome = "refused " + error;
        }
        System.out.println(what + " " + outcome);
    }

    private static void ciphers() throws Exception {
        byte[] blocks = Arrays.copyOf(MESSAGE, 50_000);
        AlgorithmParameterSpec nonce = new GCMParameterSpec(128, Arrays.copyOf(MESSAGE, 12)), iv = new IvParameterSpec(Arrays.copyOf(MESSAGE, 16));
        for (int bits : List.of(128, 192, 256)) {
            SecretKey known = new SecretKeySpec(Arrays.copyOf(MESSAGE, bits / 8), "AES");
            SecretKey brought = SecretKeyFactory.getInstance("AES", provider).translateKey(known);
            KeyGenerator generator = KeyGenerator.getInstance("AES", provider);
            generator.init(bits);
            SecretKey made = generator.generateKey();
            report("never extractable " + bits, () -> made.getEncoded() == null);
            cipher("AES/GCM/NoPadding", brought, known, made, nonce, MESSAGE);
            cipher("AES/CBC/PKCS5Padding", brought, known, made, iv, MESSAGE);
            cipher("AES/CBC/NoPadding", brought, known, made, iv, blocks);
            cipher("AES/CTR/NoPadding", brought, known, made, iv, MESSAGE);
            cipher("AES/ECB/PKCS5Padding", brought, known, made, null, MESSAGE);
            cipher("AES/ECB/NoPadding", brought, known, made, null, blocks);
        }
    }

    /** What the token seals with a key that was brought is what Java seals, and it opens that, and what it sealed with a key of its own. */
    private static void cipher(String name, SecretKey brought, SecretKey known, SecretKey made, AlgorithmParameterSpec with, byte[] data) {
        report(name + " " + known.getEncoded().length * 8, () -> {
            byte[] sealed = run(name, provider, Cipher.ENCRYPT_MODE, brought, with, data);
            return Arrays.equals(sealed, run(name, Security.getProvider("SunJCE"), Cipher.ENCRYPT_MODE, known, with, data))
                    && Arrays.equals(run(name, provider, Cipher.DECRYPT_MODE, brought, with, sealed), data)
                    && opens(name, made, with, data);
        });
    }

    private static boolean opens(String name, SecretKey made, AlgorithmParameterSpec with, byte[] data) throws Exception {
        byte[] sealed = run(name, provider, Cipher.ENCRYPT_MODE, made, with, data);
        return !Arrays.equals(sealed, data) && Arrays.equals(run(name, provider, Cipher.DECRYPT_MODE, made, with, sealed), data);
    }

    private static byte[] run(String name, Provider with, int mode, SecretKey key, AlgorithmParameterSpec parameters, byte[] data)
            throws Exception {
        Cipher cipher = Cipher.getInstance(name, with);
        cipher.init(mode, key, parameters);
        if (name.contains("GCM")) cipher.updateAAD("header".getBytes());
        return inParts(cipher, data);
    }

    private static byte[] inParts(Cipher cipher, byte[] data) throws Exception {
        java.io.ByteArrayOutputStream out = new java.io.ByteArrayOutputStream();
        for (int at = 0; at < data.length; at += 7_777) {
            byte[] part = cipher.update(data, at, Math.min(7_777, data.length - at));
            if (part != null) out.write(part);
        }
        out.write(cipher.doFinal());
        return out.toByteArray();
    }

    private static void macsAndDigests() {
        for (String hash : List.of("SHA1", "SHA224", "SHA256", "SHA384", "SHA512")) {
            report("Hmac" + hash, () -> {
                SecretKey key = new SecretKeySpec(Arrays.copyOf(MESSAGE, 40), "Hmac" + hash);
                Mac here = Mac.getInstance("Hmac" + hash, provider), there = Mac.getInstance("Hmac" + hash, "SunJCE");
                here.init(key);
                there.init(key);
                return Arrays.equals(here.doFinal(MESSAGE), there.doFinal(MESSAGE));
            });
        }
        for (String hash : List.of("SHA-1", "SHA-224", "SHA-256", "SHA-384", "SHA-512", "SHA-512/256", "SHA3-256", "SHA3-512")) {
            report(hash, () -> Arrays.equals(
                    MessageDigest.getInstance(hash, provider).digest(MESSAGE), MessageDigest.getInstance(hash, "SUN").digest(MESSAGE)));
        }
        report("SecureRandom", () -> {
            byte[] one = new byte[32], other = new byte[32];
            SecureRandom random = SecureRandom.getInstance("PKCS11", provider);
            random.nextBytes(one);
            random.nextBytes(other);
            return !Arrays.equals(one, other);
        });
    }

    private static KeyPair pair(String algorithm, String curve, int bits, Provider from) throws Exception {
        KeyPairGenerator generator = KeyPairGenerator.getInstance(algorithm, from);
        if (curve.isEmpty()) generator.initialize(bits); else generator.initialize(new ECGenParameterSpec(curve));
        return generator.generateKeyPair();
    }

    private static byte[] agreed(Provider with, PrivateKey key, PublicKey peer) throws Exception {
        KeyAgreement agreement = KeyAgreement.getInstance("ECDH", with);
        agreement.init(key);
        agreement.doPhase(peer, true);
        return agreement.generateSecret();
    }

    private static void agreements() {
        Provider software = Security.getProvider("SunEC");
        for (String curve : List.of("secp256r1", "secp384r1", "secp521r1")) {
            report("ECDH " + curve, () -> {
                KeyPair ours = pair("EC", curve, 0, provider), theirs = pair("EC", curve, 0, software);
                PublicKey told = KeyFactory.getInstance("EC", software).generatePublic(new X509EncodedKeySpec(ours.getPublic().getEncoded()));
                return Arrays.equals(agreed(provider, ours.getPrivate(), theirs.getPublic()), agreed(software, theirs.getPrivate(), told));
            });
        }
    }

    private static void signatures() throws Exception {
        for (String curve : List.of("secp256r1", "secp384r1", "secp521r1")) {
            KeyPair pair = pair("EC", curve, 0, provider);
            for (String hash : List.of("SHA1", "SHA224", "SHA256", "SHA384", "SHA512")) sign(curve, pair, hash + "withECDSA", null);
            for (String hash : List.of("SHA256", "SHA512")) sign(curve, pair, hash + "withECDSAinP1363Format", null);
        }
        KeyPair pair = pair("RSA", "", 2048, provider);
        for (String hash : List.of("SHA1", "SHA224", "SHA256", "SHA384", "SHA512")) {
            sign("RSA", pair, hash + "withRSA", null);
            String name = hash.replace("SHA", "SHA-");
            int length = MessageDigest.getInstance(name).getDigestLength();
            sign("RSA", pair, "RSASSA-PSS", new PSSParameterSpec(name, "MGF1", new MGF1ParameterSpec(name), length, 1));
        }
        report("RSA/ECB/PKCS1Padding", () -> {
            Cipher cipher = Cipher.getInstance("RSA/ECB/PKCS1Padding", provider);
            cipher.init(Cipher.ENCRYPT_MODE, pair.getPublic());
            byte[] sealed = cipher.doFinal(Arrays.copyOf(MESSAGE, 100));
            cipher.init(Cipher.DECRYPT_MODE, pair.getPrivate());
            return Arrays.equals(cipher.doFinal(sealed), Arrays.copyOf(MESSAGE, 100));
        });
        report("RSA wraps AES", () -> {
            SecretKey key = new SecretKeySpec(Arrays.copyOf(MESSAGE, 32), "AES");
            Cipher cipher = Cipher.getInstance("RSA/ECB/PKCS1Padding", provider);
            cipher.init(Cipher.WRAP_MODE, pair.getPublic());
            byte[] wrapped = cipher.wrap(key);
            cipher.init(Cipher.UNWRAP_MODE, pair.getPrivate());
            return Arrays.equals(cipher.unwrap(wrapped, "AES", Cipher.SECRET_KEY).getEncoded(), key.getEncoded());
        });
    }

    private static void sign(String kind, KeyPair pair, String algorithm, AlgorithmParameterSpec parameters) {
        String shown = parameters instanceof PSSParameterSpec pss ? algorithm + " " + pss.getDigestAlgorithm() : algorithm;
        report(kind + " " + shown, () -> {
            Provider software = Security.getProvider(kind.equals("RSA") ? "SunRsaSign" : "SunEC");
            Signature signer = Signature.getInstance(algorithm, provider);
            if (parameters != null) signer.setParameter(parameters);
            signer.initSign(pair.getPrivate());
            signer.update(MESSAGE);
            byte[] signature = signer.sign();
            PublicKey told = KeyFactory.getInstance(pair.getPublic().getAlgorithm(), software)
                    .generatePublic(new X509EncodedKeySpec(pair.getPublic().getEncoded()));
            Signature outside = Signature.getInstance(algorithm, software), inside = Signature.getInstance(algorithm, provider);
            for (Signature verifier : List.of(outside, inside)) {
                if (parameters != null) verifier.setParameter(parameters);
                verifier.initVerify(verifier == outside ? told : pair.getPublic());
                verifier.update(MESSAGE);
                if (!verifier.verify(signature)) return false;
            }
            return true;
        });
    }

    /** Secret keys as entries of the key store: stored, found again by another KeyStore, used, taken away. */
    private static void entries(KeyStore store) {
        report("secret entry", () -> {
            SecretKey key = new SecretKeySpec(Arrays.copyOf(MESSAGE, 32), "AES");
            store.setEntry("stored", new KeyStore.SecretKeyEntry(key), null);
            KeyStore again = KeyStore.getInstance("PKCS11", provider);
            again.load(null, null);
            Cipher here = Cipher.getInstance("AES/ECB/NoPadding", provider), there = Cipher.getInstance("AES/ECB/NoPadding", "SunJCE");
            here.init(Cipher.ENCRYPT_MODE, again.getKey("stored", null));
            there.init(Cipher.ENCRYPT_MODE, key);
            boolean same = Arrays.equals(here.doFinal(Arrays.copyOf(MESSAGE, 64)), there.doFinal(Arrays.copyOf(MESSAGE, 64)));
            again.deleteEntry("stored");
            return same && !again.containsAlias("stored");
        });
    }
}
