package launch

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// Sizes of what a launch is given, octets (SNP ABI, section 8.18, SNP_LAUNCH_FINISH).
const (
	IDBlockSize = 96
	IDAuthSize  = 4096
	idSize      = 16
)

// An IDBlock says what a guest must be: the firmware does not start one that is anything else.
type IDBlock struct {
	Digest   Digest       // the launch digest
	FamilyID [idSize]byte // the owner's own
	ImageID  [idSize]byte // the owner's own
	GuestSVN uint32       // the owner's own
	Policy   uint64       // the guest's policy (SNP ABI, section 4.3)
}

// Marshal returns the block's 96 octets (SNP ABI, structure ID_BLOCK).
func (b *IDBlock) Marshal() []byte {
	out := make([]byte, 0, IDBlockSize)
	out = append(out, b.Digest[:]...)
	out = append(out, b.FamilyID[:]...)
	out = append(out, b.ImageID[:]...)
	out = binary.LittleEndian.AppendUint32(out, 1) // the version of this structure
	out = binary.LittleEndian.AppendUint32(out, b.GuestSVN)
	return binary.LittleEndian.AppendUint64(out, b.Policy)
}

// Where things are in ID_AUTH_INFO, and what they are.
const (
	algorithmP384  = 1 // ECDSA P-384 with SHA-384
	curveP384      = 2
	idSignatureAt  = 0x40
	idKeyAt        = 0x240
	keySignatureAt = 0x680
	authorKeyAt    = 0x880
	keySize        = 0x404
	numberSize     = 72 // of a coordinate, or of half a signature, little-endian
	p384Octets     = 48
)

// Sign returns the ID auth block, 4096 octets (SNP ABI, structure ID_AUTH_INFO): the ID key's signature of the block and, if there
// is an author key, its signature of the ID key. The same input always gives the same octets.
func (b *IDBlock) Sign(idKey, authorKey *ecdsa.PrivateKey) ([]byte, error) {
	out := make([]byte, IDAuthSize)
	binary.LittleEndian.PutUint32(out, algorithmP384)
	public, err := marshalKey(&idKey.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("ID key: %w", err)
	}
	copy(out[idKeyAt:], public)
	if err := sign(out[idSignatureAt:], idKey, b.Marshal()); err != nil {
		return nil, fmt.Errorf("signing with the ID key: %w", err)
	}
	if authorKey == nil {
		return out, nil
	}
	binary.LittleEndian.PutUint32(out[4:], algorithmP384)
	author, err := marshalKey(&authorKey.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("author key: %w", err)
	}
	copy(out[authorKeyAt:], author)
	if err := sign(out[keySignatureAt:], authorKey, public); err != nil {
		return nil, fmt.Errorf("signing with the author key: %w", err)
	}
	return out, nil
}

// KeyDigest returns what reports call a key: ID_KEY_DIGEST, AUTHOR_KEY_DIGEST.
func KeyDigest(key *ecdsa.PublicKey) (Digest, error) {
	octets, err := marshalKey(key)
	if err != nil {
		return Digest{}, err
	}
	return sha512.Sum384(octets), nil
}

// marshalKey returns a public key as the firmware has it: the curve, and both coordinates little-endian.
func marshalKey(key *ecdsa.PublicKey) ([]byte, error) {
	if key.Curve != elliptic.P384() {
		return nil, errors.New("expected a key on P-384")
	}
	point, err := key.Bytes() // 4, X, Y
	if err != nil {
		return nil, err
	}
	out := make([]byte, keySize)
	binary.LittleEndian.PutUint32(out, curveP384)
	for i := range 2 {
		number := slices.Clone(point[1+i*p384Octets:][:p384Octets])
		slices.Reverse(number)
		copy(out[4+i*numberSize:], number)
	}
	return out, nil
}

// sign puts a signature over a message into the beginning of dst.
func sign(dst []byte, key *ecdsa.PrivateKey, message []byte) error {
	digest := sha512.Sum384(message)
	der, err := key.Sign(nil, digest[:], crypto.SHA384) // without randomness: RFC 6979
	if err != nil {
		return err
	}
	var pair struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &pair); err != nil {
		return err
	}
	for i, n := range []*big.Int{pair.R, pair.S} {
		number := n.FillBytes(make([]byte, numberSize))
		slices.Reverse(number)
		copy(dst[i*numberSize:], number)
	}
	return nil
}

// ParseKey reads a private key in PEM, as OpenSSL writes it for P-384. Its errors say nothing of what the file holds.
func ParseKey(text []byte) (*ecdsa.PrivateKey, error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		var key any
		var err error
		switch block.Type {
		case "EC PARAMETERS":
			continue
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		default:
			return nil, errors.New("expected a private key in PEM that is not encrypted, got another kind of PEM")
		}
		ec, ok := key.(*ecdsa.PrivateKey)
		if err != nil || !ok || ec.Curve != elliptic.P384() {
			return nil, errors.New("expected a private key on P-384 (openssl ecparam -name secp384r1 -genkey), got another one")
		}
		return ec, nil
	}
	return nil, errors.New("expected a private key in PEM, got none")
}
