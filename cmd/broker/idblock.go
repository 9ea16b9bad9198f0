package main

import (
	"cmp"
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"keybroker/attest"
	"keybroker/attest/launch"
	"keybroker/derive"
)

// idBlockFlags are what goes into an ID block, and around it.
type idBlockFlags struct {
	measurement, familyID, imageID string
	guestSVN                       uint32
	policy                         string
	idKey, authorKey               string
	subject, hostData              string
	kernelHashes                   bool
	block, auth                    string
	asJSON                         bool
}

func newIDBlockCommand(g *globals) *cobra.Command {
	f := &idBlockFlags{}
	c := &cobra.Command{
		Use:   "idblock",
		Short: "Make and sign the ID block of an SEV-SNP guest, and print libvirt's element for it",
		Long: `Make the ID block of an SEV-SNP guest and sign it: the firmware then starts the guest only with this launch digest and this
policy, and its reports have the digest of the ID key (and of the author key, if there is one, which signs the ID key).
Prints libvirt's <launchSecurity> with both blocks and with HOST_DATA; the digests of the keys are in a comment.

Keys are on P-384, in PEM: openssl ecparam -name secp384r1 -genkey -noout -out id.pem`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return g.idBlock(f) },
	}
	c.Flags().StringVar(&f.measurement, "measurement", "", "the launch digest, 96 hexadecimal `DIGITS`, as keybroker measure prints it")
	c.Flags().StringVar(&f.idKey, "id-key", "", "`FILE` with the ID key")
	c.Flags().StringVar(&f.authorKey, "author-key", "", "`FILE` with the author key")
	c.Flags().StringVar(&f.familyID, "family-id", "", "FAMILY_ID, 32 hexadecimal `DIGITS` (default zeros)")
	c.Flags().StringVar(&f.imageID, "image-id", "", "IMAGE_ID, 32 hexadecimal `DIGITS` (default zeros)")
	c.Flags().Uint32Var(&f.guestSVN, "guest-svn", 0, "GUEST_SVN")
	c.Flags().StringVar(&f.policy, "guest-policy", "0x30000", "the guest's policy as a `NUMBER`; 0x30000 allows SMT and nothing else")
	c.Flags().StringVar(&f.subject, "subject", "", "`UUID` whose HOST_DATA the guest gets, as in a policy")
	c.Flags().StringVar(&f.hostData, "host-data", "", "HOST_DATA itself, 64 hexadecimal `DIGITS`")
	c.Flags().BoolVar(&f.kernelHashes, "kernel-hashes", false, "kernel, initrd and command line are measured")
	c.Flags().StringVar(&f.block, "out-block", "", "write the ID block, 96 octets, to a new `FILE`")
	c.Flags().StringVar(&f.auth, "out-auth", "", "write the ID auth block, 4096 octets, to a new `FILE`")
	c.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	_ = c.MarkFlagRequired("measurement")
	_ = c.MarkFlagRequired("id-key")
	c.MarkFlagsMutuallyExclusive("subject", "host-data")
	return c
}

// A signedBlock is what idblock prints.
type signedBlock struct {
	Block           []byte `json:"id_block"`
	Auth            []byte `json:"id_auth"`
	IDKeyDigest     string `json:"id_key_digest"`
	AuthorKeyDigest string `json:"author_key_digest,omitempty"`
	HostData        string `json:"host_data,omitempty"` // hexadecimal
	XML             string `json:"xml"`
}

func (g *globals) idBlock(f *idBlockFlags) error {
	block, err := f.parse()
	if err != nil {
		return usageError{err}
	}
	hostData, err := f.parseHostData()
	if err != nil {
		return usageError{err}
	}
	out := &signedBlock{Block: block.Marshal(), HostData: hex.EncodeToString(hostData)}
	if err := f.sign(block, out); err != nil {
		return err
	}
	out.XML = f.element(out, block.Policy, hostData)
	g.warnGuestPolicy(block.Policy)
	if err := errors.Join(writeBlock(f.block, out.Block), writeBlock(f.auth, out.Auth)); err != nil {
		return err
	}
	if f.asJSON {
		return writeJSON(g.stdout, out)
	}
	_, err = io.WriteString(g.stdout, out.XML)
	return err
}

// parse takes the block's fields from the flags.
func (f *idBlockFlags) parse() (*launch.IDBlock, error) {
	b := &launch.IDBlock{GuestSVN: f.guestSVN}
	var err error
	if b.Policy, err = strconv.ParseUint(f.policy, 0, 64); err != nil || b.Policy&(1<<17) == 0 {
		return nil, fmt.Errorf("--guest-policy: expected a number with bit 17, such as 0x30000, got %.20q", f.policy)
	}
	if f.measurement == "" {
		return nil, errors.New("--measurement: expected the launch digest, got nothing")
	}
	return b, cmp.Or(
		fixed("measurement", f.measurement, b.Digest[:]), fixed("family-id", f.familyID, b.FamilyID[:]), fixed("image-id", f.imageID, b.ImageID[:]))
}

// fixed decodes hexadecimal of a fixed size; an empty string leaves zeros.
func fixed(flag, digits string, dst []byte) error {
	if digits == "" {
		return nil
	}
	octets, err := hex.DecodeString(digits)
	if err != nil || len(octets) != len(dst) {
		return fmt.Errorf("--%s: expected %d hexadecimal digits, got %d characters", flag, 2*len(dst), len(digits))
	}
	copy(dst, octets)
	return nil
}

// parseHostData returns nil if the flags say nothing of it.
func (f *idBlockFlags) parseHostData() ([]byte, error) {
	switch {
	case f.subject != "":
		if err := derive.CheckSubject(f.subject); err != nil {
			return nil, fmt.Errorf("--subject: %w", err)
		}
		return attest.HostData(f.subject), nil
	case f.hostData != "":
		octets := make([]byte, 32)
		return octets, fixed("host-data", f.hostData, octets)
	}
	return nil, nil
}

// sign reads the keys and fills in what they make.
func (f *idBlockFlags) sign(b *launch.IDBlock, out *signedBlock) error {
	idKey, err := readKey(f.idKey)
	if err != nil {
		return err
	}
	var authorKey *ecdsa.PrivateKey
	if f.authorKey != "" {
		if authorKey, err = readKey(f.authorKey); err != nil {
			return err
		}
		digest, err := launch.KeyDigest(&authorKey.PublicKey)
		if err != nil {
			return err
		}
		out.AuthorKeyDigest = hex.EncodeToString(digest[:])
	}
	digest, err := launch.KeyDigest(&idKey.PublicKey)
	if err != nil {
		return err
	}
	out.IDKeyDigest = hex.EncodeToString(digest[:])
	out.Auth, err = b.Sign(idKey, authorKey)
	return err
}

func readKey(name string) (*ecdsa.PrivateKey, error) {
	text, err := readBounded(name)
	if err != nil {
		return nil, err
	}
	key, err := launch.ParseKey(text)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	return key, nil
}

// element is libvirt's <launchSecurity>.
func (f *idBlockFlags) element(out *signedBlock, policy uint64, hostData []byte) string {
	var b strings.Builder
	fmt.Fprintf(&b, "<!-- ID key digest %s -->\n", out.IDKeyDigest)
	attributes := ""
	if f.kernelHashes {
		attributes += " kernelHashes='yes'"
	}
	if out.AuthorKeyDigest != "" {
		fmt.Fprintf(&b, "<!-- author key digest %s -->\n", out.AuthorKeyDigest)
		attributes += " authorKey='yes'"
	}
	base := base64.StdEncoding.EncodeToString
	fmt.Fprintf(&b, "<launchSecurity type='sev-snp'%s>\n  <policy>%#x</policy>\n", attributes, policy)
	fmt.Fprintf(&b, "  <idBlock>%s</idBlock>\n  <idAuth>%s</idAuth>\n", base(out.Block), base(out.Auth))
	if hostData != nil {
		fmt.Fprintf(&b, "  <hostData>%s</hostData>\n", base(hostData))
	}
	b.WriteString("</launchSecurity>\n")
	return b.String()
}

// warnGuestPolicy says what weakens a guest with this policy (SNP ABI, section 4.3).
func (g *globals) warnGuestPolicy(policy uint64) {
	if policy&(1<<19) != 0 {
		g.warn("the guest's policy allows debugging: the host can read its memory")
	}
	if policy&(1<<18) != 0 {
		g.warn("the guest's policy allows a migration agent, which can hand on its memory")
	}
}

// writeBlock writes a file that must not exist; without a name, none.
func writeBlock(name string, octets []byte) error {
	if name == "" {
		return nil
	}
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(octets)
	return errors.Join(err, file.Close())
}
