package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"

	"github.com/go-json-experiment/json/jsontext"

	"keybroker/internal/tuple"
)

// What is wrapped is a 12 octet nonce, 32 octets of ciphertext and a 16 octet tag.
const wrappedSize = 12 + KeySize + 16

const label = "keybroker/v1 "

// info returns the HKDF info of a label and its fields. The leading 0x00 is in no name.
func info(what string, fields ...[]byte) string {
	return "\x00" + string(tuple.Encode([]byte(label+what))) + string(tuple.Encode(fields...))
}

// generationInfo is for the key that wraps the master of one generation, derived from the share.
func generationInfo(realm RealmID, number uint32) string {
	return info("realm generation", realm[:], tuple.Uint32(number))
}

// macInfo is for the key that authenticates the realm file, derived from the share.
func macInfo(realm RealmID) string { return info("realm mac", realm[:]) }

// slotAAD binds a wrapped share to everything public about its slot.
func slotAAD(version uint32, realm RealmID, require uint32, slot SlotID, kind string, params jsontext.Value) []byte {
	return tuple.Encode([]byte(label+"slot"), tuple.Uint32(version), realm[:], tuple.Uint32(require), slot[:], []byte(kind), params)
}

// generationAAD binds a wrapped master to its place.
func generationAAD(version uint32, realm RealmID, number uint32, check RealmID) []byte {
	return tuple.Encode([]byte(label+"realm generation"), tuple.Uint32(version), realm[:], tuple.Uint32(number), check[:])
}

// macInput is what the realm file's mac authenticates: the file without mac and sum.
func macInput(body []byte) []byte { return tuple.Encode([]byte(label+"realm mac"), body) }

// sumInput is what the realm file's sum is the SHA-256 of: the file without sum.
func sumInput(body []byte) []byte { return tuple.Encode([]byte(label+"realm sum"), body) }

// expand derives one key from the share, which is uniformly random.
func expand(share Key, info string) Key {
	prk, err := hkdf.Extract(sha256.New, share.Octets(), nil)
	if err != nil {
		panic(err) // only a hash that FIPS mode forbids
	}
	out, err := hkdf.Expand(sha256.New, prk, info, KeySize)
	if err != nil {
		panic(err) // only a length beyond 255 hashes
	}
	clear(prk)
	defer clear(out)
	k, err := NewKey(out)
	if err != nil {
		panic(err)
	}
	return k
}

func fileMAC(share Key, realm RealmID, body []byte) []byte {
	k := expand(share, macInfo(realm))
	defer k.Wipe()
	h := hmac.New(sha256.New, k.Octets())
	h.Write(macInput(body))
	return h.Sum(nil)
}

func newGCM(k Key) cipher.AEAD {
	block, err := aes.NewCipher(k.Octets())
	if err != nil {
		panic(err) // only a wrong key length
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// wrap encrypts 32 octets under a key: nonce, ciphertext, tag.
func wrap(k Key, plain, aad []byte) []byte {
	nonce := make([]byte, 12, wrappedSize)
	rand.Read(nonce)
	return newGCM(k).Seal(nonce, nonce, plain, aad)
}

var errUnwrap = errors.New("wrapped octets do not open under this key")

func unwrap(k Key, wrapped, aad []byte) ([]byte, error) {
	if len(wrapped) != wrappedSize {
		return nil, errUnwrap
	}
	plain, err := newGCM(k).Open(nil, wrapped[:12], wrapped[12:], aad)
	if err != nil {
		return nil, errUnwrap
	}
	return plain, nil
}
