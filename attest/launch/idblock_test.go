package launch

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-sev-guest/abi"

	"keybroker/internal/need"
)

func block() *IDBlock {
	return &IDBlock{Digest: sha512.Sum384([]byte("image")), FamilyID: [16]byte{1}, ImageID: [16]byte{2}, GuestSVN: 0x01020304, Policy: 0x30000}
}

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// DO NOT CHANGE: the firmware reads these octets.
func TestIDBlockGolden(t *testing.T) {
	sum := sha512.Sum384([]byte("image"))
	want := hex.EncodeToString(sum[:]) + "01000000000000000000000000000000" + "02000000000000000000000000000000" + "01000000" + "04030201" + "0000030000000000"
	if got := hex.EncodeToString(block().Marshal()); got != want || len(got) != 2*IDBlockSize {
		t.Errorf("%s, not %s", got, want)
	}
}

// openssl verifies a signature of an ID auth block with a public key that is read from it.
func openssl(t *testing.T, auth []byte, keyAt, signatureAt int, message []byte) {
	t.Helper()
	need.Program(t, "openssl")
	little := func(at int) *big.Int {
		number := slices.Clone(auth[at : at+numberSize])
		slices.Reverse(number)
		return new(big.Int).SetBytes(number)
	}
	if auth[keyAt] != curveP384 {
		t.Fatalf("curve %d", auth[keyAt])
	}
	point := append([]byte{4}, little(keyAt+4).FillBytes(make([]byte, 48))...)
	point = append(point, little(keyAt+4+numberSize).FillBytes(make([]byte, 48))...)
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), point)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := asn1.Marshal(struct{ R, S *big.Int }{little(signatureAt), little(signatureAt + numberSize)})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, octets := range map[string][]byte{
		"key": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), "signature": signature, "message": message,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), octets, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "openssl", "dgst", "-sha384", "-verify", "key", "-signature", "signature", "message")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "Verified OK") {
		t.Errorf("%v: %s", err, out)
	}
}

// The signatures are good for OpenSSL, and keys are as go-sev-guest writes them.
func TestIDAuth(t *testing.T) {
	id, author := newKey(t, elliptic.P384()), newKey(t, elliptic.P384())
	auth, err := block().Sign(id, author)
	if err != nil || len(auth) != IDAuthSize {
		t.Fatalf("%d octets, %v", len(auth), err)
	}
	openssl(t, auth, idKeyAt, idSignatureAt, block().Marshal())
	openssl(t, auth, authorKeyAt, keySignatureAt, auth[idKeyAt:idKeyAt+keySize])
	for at, key := range map[int]*ecdsa.PrivateKey{idKeyAt: id, authorKeyAt: author} {
		want, err := abi.EcdsaPublicKeyToBytes(&key.PublicKey)
		if err != nil || !bytes.Equal(auth[at:at+keySize], want) {
			t.Errorf("the key at %#x is not as the library writes it: %v", at, err)
		}
		if digest, err := KeyDigest(&key.PublicKey); err != nil || digest != sha512.Sum384(want) {
			t.Errorf("digest %x, %v", digest, err)
		}
	}
	if !bytes.Equal(auth[:8], []byte{1, 0, 0, 0, 1, 0, 0, 0}) || len(bytes.Trim(auth[8:idSignatureAt], "\x00")) > 0 {
		t.Errorf("algorithms: %x", auth[:idSignatureAt])
	}
	again, err := block().Sign(id, author)
	if err != nil || !bytes.Equal(auth, again) {
		t.Error("the same input gives other octets")
	}
	alone, err := block().Sign(id, nil)
	if err != nil || len(bytes.Trim(alone[keySignatureAt:], "\x00")) > 0 || !bytes.Equal(alone[:8], []byte{1, 0, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("without an author key: %v", err)
	}
	if out, err := block().Sign(newKey(t, elliptic.P256()), nil); err == nil || out != nil {
		t.Error("a key on P-256 signs")
	}
	if out, err := block().Sign(id, newKey(t, elliptic.P256())); err == nil || out != nil {
		t.Error("an author key on P-256 signs")
	}
}

func TestParseKey(t *testing.T) {
	key := newKey(t, elliptic.P384())
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := x509.MarshalPKCS8PrivateKey(newKey(t, elliptic.P256()))
	if err != nil {
		t.Fatal(err)
	}
	inPEM := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	for _, good := range [][]byte{
		inPEM("EC PRIVATE KEY", sec1), inPEM("PRIVATE KEY", pkcs8), append(inPEM("EC PARAMETERS", []byte{6, 0}), inPEM("EC PRIVATE KEY", sec1)...),
	} {
		if got, err := ParseKey(good); err != nil || !got.Equal(key) {
			t.Errorf("%v", err)
		}
	}
	for _, bad := range [][]byte{
		nil, []byte("SECRET"), inPEM("PRIVATE KEY", p256), inPEM("PRIVATE KEY", []byte("SECRET")), inPEM("EC PRIVATE KEY", []byte("SECRET")),
		inPEM("ENCRYPTED PRIVATE KEY", pkcs8), inPEM("SECRET", sec1),
	} {
		if got, err := ParseKey(bad); err == nil || got != nil || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%v", err)
		}
	}
}
